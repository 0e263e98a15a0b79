/*
 * A histogram of latencies in time-stamp counter cycles: 64 linear steps for each power of two, so that a percentile is
 * exact to 1.6 % over the whole range at the cost of one increment for each frame.
 */
#ifndef VIADUCT_BENCH_LATENCY_H
#define VIADUCT_BENCH_LATENCY_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define LATENCY_STEPS 64u
#define LATENCY_BUCKETS (LATENCY_STEPS * 48u)

struct latency {
	uint64_t count, smallest, largest;
	double sum;
	uint32_t bucket[LATENCY_BUCKETS];
};

static inline void latency_clear(struct latency *h)
{
	memset(h, 0, sizeof *h);
	h->smallest = UINT64_MAX;
}

static inline unsigned latency_bucket(uint64_t cycles)
{
	unsigned power, bucket;

	if (cycles < LATENCY_STEPS)
		return (unsigned)cycles;
	power = 63 - (unsigned)__builtin_clzll(cycles);
	bucket = (power - 5) * LATENCY_STEPS + (unsigned)((cycles >> (power - 6)) & (LATENCY_STEPS - 1));
	return bucket < LATENCY_BUCKETS ? bucket : LATENCY_BUCKETS - 1;
}

/* The middle of a bucket, in cycles. */
static inline double latency_value(unsigned bucket)
{
	unsigned power;

	if (bucket < LATENCY_STEPS)
		return bucket;
	power = bucket / LATENCY_STEPS + 5;
	return (double)(1ull << power) + ((bucket % LATENCY_STEPS) + 0.5) * (double)(1ull << (power - 6));
}

static inline void latency_add(struct latency *h, uint64_t cycles)
{
	h->bucket[latency_bucket(cycles)]++;
	h->count++;
	h->sum += (double)cycles;
	if (cycles < h->smallest)
		h->smallest = cycles;
	if (cycles > h->largest)
		h->largest = cycles;
}

static inline double latency_percentile(const struct latency *h, double share)
{
	uint64_t wanted = (uint64_t)(share * (double)h->count), passed = 0;

	for (unsigned i = 0; i < LATENCY_BUCKETS; i++) {
		passed += h->bucket[i];
		if (passed > wanted)
			return latency_value(i);
	}
	return (double)h->largest;
}

/* One JSON object in microseconds; the histogram as [upper middle, count] pairs of the buckets that are not empty. */
static inline void latency_print(const struct latency *h, double cycles_per_us)
{
	const char *separator = "";

	printf("{\"count\":%lu,\"min\":%.3f,\"mean\":%.3f,\"p50\":%.3f,\"p90\":%.3f,\"p99\":%.3f,\"p999\":%.3f,\"max\":%.3f,"
	       "\"histogram\":[",
	       h->count, (double)h->smallest / cycles_per_us, h->sum / (double)h->count / cycles_per_us,
	       latency_percentile(h, 0.5) / cycles_per_us, latency_percentile(h, 0.9) / cycles_per_us,
	       latency_percentile(h, 0.99) / cycles_per_us, latency_percentile(h, 0.999) / cycles_per_us,
	       (double)h->largest / cycles_per_us);
	for (unsigned i = 0; i < LATENCY_BUCKETS; i++)
		if (h->bucket[i]) {
			printf("%s[%.3f,%u]", separator, latency_value(i) / cycles_per_us, h->bucket[i]);
			separator = ",";
		}
	printf("]}");
}

#endif
