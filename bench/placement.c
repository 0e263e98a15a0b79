/*
 * How far apart are two virtual CPUs right now?
 *
 *   placement CPU CPU [PERIOD_MS]
 *
 * A hypervisor moves virtual CPUs between the host's cores. While two of them share a last-level cache, a line written
 * by one reaches the other in half the time it takes otherwise, and with it goes everything that a switch and its guests
 * do. So this program bounces one cache line between the two CPUs, a few dozen microseconds in each period, for as long
 * as it runs, and prints for each period
 *
 *   {"time": seconds since the epoch, "round_trip_ns": median of several bursts, or null if a side was late,
 *    "tsc_hz": rate of the time-stamp counter}
 *
 * It runs at real-time priority where that is allowed, because the CPUs are busy with what is being measured.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <x86intrin.h>

#define BURSTS 7
#define BOUNCES 40
#define LATE_NS 300000

static struct {
	_Alignas(128) _Atomic uint64_t ball;
	_Alignas(128) uint64_t begin; /* CLOCK_MONOTONIC, ns */
	uint64_t period;	      /* ns */
	int cpu[2];
} shared;

static uint64_t monotonic(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void sleep_until(uint64_t ns)
{
	struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

static void settle(int cpu)
{
	struct sched_param priority = {.sched_priority = 50};
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (pthread_setaffinity_np(pthread_self(), sizeof set, &set)) {
		fprintf(stderr, "placement: CPU %d is not available to this process\n", cpu);
		exit(1);
	}
	pthread_setschedparam(pthread_self(), SCHED_FIFO, &priority); /* without it there are more late periods */
}

/* The values of a period start from its number, so that a late side never answers a bounce of another period. */
static uint64_t first_value(uint64_t period)
{
	return period << 32;
}

static void *answer(void *unused)
{
	(void)unused;
	settle(shared.cpu[1]);
	for (uint64_t period = 1;; period++) {
		uint64_t expected = first_value(period) + 1, last = first_value(period) + 2 * BURSTS * BOUNCES, late;
		unsigned spins = 0;

		sleep_until(shared.begin + period * shared.period);
		late = shared.begin + period * shared.period + LATE_NS;
		while (expected < last) {
			if (atomic_load_explicit(&shared.ball, memory_order_acquire) == expected) {
				atomic_store_explicit(&shared.ball, expected + 1, memory_order_release);
				expected += 2;
			} else if (++spins % 1024 == 0 && monotonic() > late) {
				break;
			}
		}
	}
	return NULL;
}

/* Mean round trip of one burst in nanoseconds, or 0 if the other side did not answer in time. */
static double burst(uint64_t *value, uint64_t late)
{
	uint64_t start = monotonic();
	unsigned spins = 0;

	for (unsigned i = 0; i < BOUNCES; i++) {
		atomic_store_explicit(&shared.ball, *value + 1, memory_order_release);
		*value += 2;
		while (atomic_load_explicit(&shared.ball, memory_order_acquire) != *value)
			if (++spins % 1024 == 0 && monotonic() > late)
				return 0;
	}
	return (double)(monotonic() - start) / BOUNCES;
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	uint64_t counter = __rdtsc();
	pthread_t thread;

	if (argc < 3) {
		fprintf(stderr, "usage: placement CPU CPU [PERIOD_MS]\n");
		return 2;
	}
	shared.cpu[0] = atoi(argv[1]);
	shared.cpu[1] = atoi(argv[2]);
	shared.period = (argc > 3 ? (uint64_t)atoi(argv[3]) : 25) * 1000000u;
	shared.begin = monotonic();
	if (pthread_create(&thread, NULL, answer, NULL))
		return 1;
	settle(shared.cpu[0]);
	for (uint64_t period = 1;; period++) {
		uint64_t value = first_value(period);
		double rounds[BURSTS];
		unsigned count = 0;
		struct timespec t;

		sleep_until(shared.begin + period * shared.period);
		while (count < BURSTS) {
			rounds[count] = burst(&value, shared.begin + period * shared.period + LATE_NS);
			if (rounds[count] == 0)
				break;
			count++;
		}
		clock_gettime(CLOCK_REALTIME, &t);
		printf("{\"time\":%ld.%06ld,\"tsc_hz\":%.0f,\"round_trip_ns\":", (long)t.tv_sec, t.tv_nsec / 1000,
		       (double)(__rdtsc() - counter) / (double)(monotonic() - shared.begin) * 1e9);
		if (count < 3) {
			printf("null}\n");
		} else {
			qsort(rounds, count, sizeof *rounds, ascending);
			printf("%.1f}\n", rounds[count / 2]);
		}
		if (fflush(stdout))
			return 0;
	}
}
