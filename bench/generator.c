/*
 * Traffic generator and sink: one core, two virtio-user ports (DPDK), driven by commands on standard input.
 *
 *   generator EAL-OPTIONS -- --port VDEV-ARGS --port VDEV-ARGS [--port ...] [--patience SECONDS] [--site N]
 *
 * Each VDEV-ARGS is what follows the device name in DPDK's --vdev=net_virtio_user0,... The ports are attached after DPDK
 * is ready, again and again until the back-end's socket accepts (or, with server=1, until the back-end has connected):
 * so the time from a back-end's start to its first packet does not contain the generator's own start. Traffic runs
 * between the first two ports; any others are connected and idle.
 *
 * Commands, one a line; each answers with one JSON line, and the generator uses no CPU between them:
 *
 *   run KEY=VALUE ...   send for a while, then receive what is still on its way
 *     seconds=S  interval=S (length of a sample)  both=0|1  size=BYTES  burst=N  rate=PPS for each direction (0: no limit)
 *     sources=N  destinations=N (stations on the sending / receiving side)  stamp=N (every Nth frame is stamped)
 *     check=N (every Nth received frame is verified)  until_first=1 (end as soon as a frame has come through)
 *     storm=1 (the third port broadcasts as fast as it can; the others put that aside, it is in no count but `storm`)
 *     shared=1 (others send on this switch too: put aside what was flooded and is not for us)
 *   announce KEY=VALUE ...   send one frame from each station that such a run addresses, for switches that learn
 *   quit
 *
 * The measured loop makes no system call and prints nothing; samples are kept and printed when it ends.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <rte_bus_vdev.h>
#include <rte_cycles.h>
#include <rte_eal.h>
#include <rte_ethdev.h>
#include <rte_mbuf.h>
#include <rte_mempool.h>
#include <rte_prefetch.h>

#include "frames.h"
#include "latency.h"

#define PORTS_MAX 32
#define BURST_MAX 256
#define RECEIVE_BURST 64
#define SAMPLES_MAX 4096
#define SIDES 2
#define STORM_PORT 2
#define STORM_BURST 32
/* After a pause a rate-limited sender may catch up by so many frames, not by an endless backlog. */
#define CREDIT_MAX 4096.0
/* The ring is considered drained when nothing has arrived for so long. */
#define DRAIN_MS 10
#define ANNOUNCE_AGAIN_SECONDS 60

struct settings {
	double seconds, interval, rate;
	unsigned size, burst, stamp, check;
	uint32_t sources, destinations;
	bool both, until_first, storm, shared;
};

struct direction { /* from side `index` to the other side */
	uint64_t offered, sent, received;
	uint64_t stamps, next_stamp; /* stamped frames sent; the lowest sequence number not yet seen */
	uint64_t checked, corrupt, disordered;
	double credit;
	uint64_t credited_at;
	unsigned since_stamp, since_check;
};

struct sample {
	double time;
	uint64_t sent, received, longest_gap;
};

static struct direction directions[SIDES];
static struct sample samples[SAMPLES_MAX];
static struct latency latencies;
static struct rte_mempool *receive_pool, *plain_pool[SIDES], *stamped_pool[SIDES], *storm_pool;
static uint64_t storm_sent;
static unsigned prepared_size;
static bool addresses_used;
static uint32_t announced_stations;
static double announced_at, first_received;
static uint32_t next_identity;

static double now_epoch(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "generator: %s\n", what);
	exit(1);
}

static void prepare_plain(struct rte_mempool *pool, void *side, void *object, unsigned index)
{
	struct rte_mbuf *m = object;

	(void)pool;
	(void)index;
	frame_write((char *)m->buf_addr + RTE_PKTMBUF_HEADROOM, prepared_size, (unsigned)(uintptr_t)side, next_identity++,
		    KIND_PLAIN);
}

static void prepare_stamped(struct rte_mempool *pool, void *side, void *object, unsigned index)
{
	struct rte_mbuf *m = object;

	(void)pool;
	(void)index;
	frame_write((char *)m->buf_addr + RTE_PKTMBUF_HEADROOM, prepared_size, (unsigned)(uintptr_t)side, next_identity++,
		    KIND_STAMPED);
}

/* Write the content of all transmit buffers. Only called when every ring is drained. */
static void prepare(unsigned size)
{
	prepared_size = size;
	next_identity = 1;
	for (unsigned side = 0; side < SIDES; side++) {
		rte_mempool_obj_iter(plain_pool[side], prepare_plain, (void *)(uintptr_t)side);
		rte_mempool_obj_iter(stamped_pool[side], prepare_stamped, (void *)(uintptr_t)side);
	}
}

static inline unsigned frames_due(struct direction *d, const struct settings *s, uint64_t now)
{
	if (s->rate <= 0)
		return s->burst;
	d->credit += s->rate * (double)(now - d->credited_at) / (double)rte_get_tsc_hz();
	d->credited_at = now;
	if (d->credit > CREDIT_MAX)
		d->credit = CREDIT_MAX;
	return d->credit >= s->burst ? s->burst : (unsigned)d->credit;
}

/* Give the frame that will be the `n`th of its direction the addresses of its stations. */
static inline void address(struct rte_mbuf *m, const struct settings *s, unsigned side, uint64_t n)
{
	frame_address(rte_pktmbuf_mtod(m, struct frame_head *), side, (uint32_t)(n % s->sources),
		      (uint32_t)(n % s->destinations));
}

static inline unsigned transmit(unsigned side, const struct settings *s, uint64_t now)
{
	struct direction *d = &directions[side];
	struct rte_mbuf *frames[BURST_MAX], *stamped = NULL;
	unsigned due = frames_due(d, s, now), sent, place = 0;

	if (!due)
		return 0;
	d->offered += due;
	if (rte_pktmbuf_alloc_bulk(plain_pool[side], frames, due))
		return 0; /* all buffers are in the ring: it is full */
	if (s->stamp == 1) { /* latency runs: each frame is a stamped one */
		rte_pktmbuf_free_bulk(frames, due);
		if (rte_pktmbuf_alloc_bulk(stamped_pool[side], frames, due))
			return 0;
		for (unsigned i = 0; i < due; i++) {
			struct frame_head *f = rte_pktmbuf_mtod(frames[i], struct frame_head *);

			f->sequence = d->stamps + i;
			f->sent = rte_rdtsc();
		}
	} else if (s->stamp && (d->since_stamp += due) >= s->stamp) {
		stamped = rte_pktmbuf_alloc(stamped_pool[side]);
		if (stamped) {
			struct frame_head *f = rte_pktmbuf_mtod(stamped, struct frame_head *);

			place = due / 2;
			rte_pktmbuf_free(frames[place]);
			frames[place] = stamped;
			f->sequence = d->stamps;
			f->sent = rte_rdtsc();
		}
	}
	for (unsigned i = 0; i < due; i++)
		frames[i]->pkt_len = frames[i]->data_len = (uint16_t)s->size;
	if (s->sources > 1 || s->destinations > 1)
		for (unsigned i = 0; i < due; i++)
			address(frames[i], s, side, d->sent + i);
	sent = rte_eth_tx_burst((uint16_t)side, 0, frames, (uint16_t)due);
	d->sent += sent;
	if (s->stamp == 1)
		d->stamps += sent;
	else if (stamped && sent > place) {
		d->stamps++;
		d->since_stamp = 0;
	}
	if (s->rate > 0)
		d->credit -= sent;
	if (sent < due)
		rte_pktmbuf_free_bulk(frames + sent, due - sent);
	return sent;
}

static void report_corrupt(const struct rte_mbuf *m, unsigned side)
{
	const uint8_t *bytes = rte_pktmbuf_mtod(m, const uint8_t *);
	unsigned shown = RTE_MIN(m->data_len, 96u);

	fprintf(stderr, "generator: damaged frame from side %u, %u bytes:", side, m->pkt_len);
	for (unsigned i = 0; i < shown; i++)
		fprintf(stderr, "%s%02x", i % 16 ? " " : "\n  ", bytes[i]);
	fputc('\n', stderr);
}

static void verify(const struct rte_mbuf *m, const struct settings *s, struct direction *d, unsigned side, uint64_t now)
{
	const struct frame_head *f = rte_pktmbuf_mtod(m, const struct frame_head *);

	d->checked++;
	if (m->nb_segs != 1 ||
	    !frame_is_intact(f, m->data_len, s->size, side, s->sources, s->destinations)) {
		if (d->corrupt++ == 0)
			report_corrupt(m, side);
		return;
	}
	if (f->kind != KIND_STAMPED)
		return;
	if (f->sequence < d->next_stamp || f->sequence > d->stamps)
		d->disordered++;
	d->next_stamp = f->sequence + 1;
	latency_add(&latencies, now - f->sent);
}

static unsigned discard(uint16_t port)
{
	struct rte_mbuf *frames[RECEIVE_BURST];
	unsigned count = rte_eth_rx_burst(port, 0, frames, RECEIVE_BURST);

	rte_pktmbuf_free_bulk(frames, count);
	return count;
}

static void prepare_storm(struct rte_mempool *pool, void *unused, void *object, unsigned index)
{
	struct rte_mbuf *m = object;
	struct frame_head *f = (void *)((char *)m->buf_addr + RTE_PKTMBUF_HEADROOM);

	(void)pool;
	(void)unused;
	frame_write(f, FRAME_MIN, STORM_PORT, index, KIND_STORM);
	memset(f->ether.dst_addr.addr_bytes, 0xff, sizeof f->ether.dst_addr.addr_bytes);
}

/* One burst of broadcasts, and whatever the others have sent to everybody. */
static inline void rage(void)
{
	struct rte_mbuf *frames[STORM_BURST];
	unsigned sent;

	discard(STORM_PORT);
	if (rte_pktmbuf_alloc_bulk(storm_pool, frames, STORM_BURST))
		return; /* all are in the ring: it is full */
	for (unsigned i = 0; i < STORM_BURST; i++)
		frames[i]->pkt_len = frames[i]->data_len = FRAME_MIN;
	sent = rte_eth_tx_burst(STORM_PORT, 0, frames, STORM_BURST);
	storm_sent += sent;
	if (sent < STORM_BURST)
		rte_pktmbuf_free_bulk(frames + sent, STORM_BURST - sent);
}

/* Free the frames that are not for side `side` of this site and move the others together. Returns how many are left. */
static inline unsigned own(struct rte_mbuf **frames, unsigned count, unsigned side)
{
	struct rte_ether_addr first;
	unsigned left = 0;

	station_ether(&first, side, 0);
	for (unsigned i = 0; i < count; i++)
		if (memcmp(rte_pktmbuf_mtod(frames[i], const struct frame_head *)->ether.dst_addr.addr_bytes,
			   first.addr_bytes, 3))
			rte_pktmbuf_free(frames[i]);
		else
			frames[left++] = frames[i];
	return left;
}

/* Receive at the far end of direction `side`. */
static inline unsigned receive(unsigned side, const struct settings *s)
{
	struct direction *d = &directions[side];
	struct rte_mbuf *frames[RECEIVE_BURST];
	unsigned count = rte_eth_rx_burst((uint16_t)!side, 0, frames, RECEIVE_BURST);

	if (unlikely(s->storm || s->shared))
		count = own(frames, count, !side);
	if (!count)
		return 0;
	if (unlikely(first_received == 0))
		first_received = now_epoch();
	if (s->check == 1) {
		uint64_t now = rte_rdtsc();

		for (unsigned i = 0; i < count; i++)
			verify(frames[i], s, d, side, now);
	} else if (s->check && (d->since_check += count) >= s->check) {
		/* The place within the burst moves on, so that each place is examined. */
		verify(frames[d->checked % count], s, d, side, rte_rdtsc());
		d->since_check = 0;
	}
	d->received += count;
	rte_pktmbuf_free_bulk(frames, count);
	return count;
}

/* Send one frame from each station that will be addressed, so that a learning switch knows them all. */
static void announce(const struct settings *s)
{
	uint32_t stations = RTE_MAX(s->sources, s->destinations);
	uint64_t end;

	addresses_used |= stations > 1;
	if (stations <= announced_stations && now_epoch() - announced_at < ANNOUNCE_AGAIN_SECONDS)
		stations = 1;
	for (unsigned side = 0; side < SIDES; side++)
		for (uint32_t n = 0; n < stations;) {
			struct rte_mbuf *m = rte_pktmbuf_alloc(plain_pool[side]);

			if (m) {
				m->pkt_len = m->data_len = (uint16_t)prepared_size;
				frame_address(rte_pktmbuf_mtod(m, struct frame_head *), side, n, 0);
				if (rte_eth_tx_burst((uint16_t)side, 0, &m, 1) == 1)
					n++;
				else
					rte_pktmbuf_free(m);
			}
			end = rte_rdtsc() + rte_get_tsc_hz() / 50000;
			while (rte_rdtsc() < end)
				discard(0), discard(1);
		}
	end = rte_rdtsc() + rte_get_tsc_hz() / 1000 * DRAIN_MS;
	while (rte_rdtsc() < end)
		if (discard(0) + discard(1))
			end = rte_rdtsc() + rte_get_tsc_hz() / 1000 * DRAIN_MS;
	if (stations > 1 || announced_stations == 0) {
		announced_stations = stations;
		announced_at = now_epoch();
	}
	printf("{\"event\":\"announced\",\"stations\":%u}\n", stations);
	fflush(stdout);
}

static void print_result(const struct settings *s, double start, double end, unsigned count, uint64_t loops,
			 uint64_t empty)
{
	double per_us = (double)rte_get_tsc_hz() / 1e6;
	struct direction sum = {0};

	for (unsigned side = 0; side < SIDES; side++) {
		const struct direction *d = &directions[side];

		sum.offered += d->offered;
		sum.sent += d->sent;
		sum.received += d->received;
		sum.stamps += d->stamps;
		sum.checked += d->checked;
		sum.corrupt += d->corrupt;
		sum.disordered += d->disordered;
	}
	printf("{\"event\":\"result\",\"start\":%.6f,\"end\":%.6f,\"size\":%u,\"first\":%.6f,\"offered\":%lu,\"sent\":%lu,"
	       "\"received\":%lu,\"lost\":%" PRId64 ",\"stamped\":%lu,\"checked\":%lu,\"corrupt\":%lu,\"disordered\":%lu,"
	       "\"loops\":%lu,\"empty_loops\":%lu,\"storm\":%lu,\"samples\":[",
	       start, end, s->size, first_received, sum.offered, sum.sent, sum.received,
	       (int64_t)(sum.sent - sum.received), sum.stamps, sum.checked, sum.corrupt, sum.disordered, loops, empty,
	       storm_sent);
	for (unsigned i = 0; i < count; i++)
		printf("%s{\"time\":%.6f,\"sent\":%lu,\"received\":%lu,\"gap_us\":%.1f}", i ? "," : "", samples[i].time,
		       samples[i].sent, samples[i].received, (double)samples[i].longest_gap / per_us);
	printf("],\"latency_us\":");
	if (latencies.count)
		latency_print(&latencies, per_us);
	else
		printf("null");
	printf("}\n");
	fflush(stdout);
}

static void run(const struct settings *s)
{
	uint64_t hz = rte_get_tsc_hz(), begin, now, before, next, end, gap = 0, loops = 0, empty = 0;
	unsigned count = 0;
	double start, stop;

	while (discard(0) + discard(1))
		;
	/* Other runs and announcements may have left another size or other addresses in the buffers. */
	if (s->size != prepared_size || addresses_used)
		prepare(s->size);
	addresses_used = s->sources > 1 || s->destinations > 1;
	memset(directions, 0, sizeof directions);
	storm_sent = 0;
	latency_clear(&latencies);
	first_received = 0;
	start = now_epoch();
	begin = before = rte_rdtsc();
	for (unsigned side = 0; side < SIDES; side++)
		directions[side].credited_at = begin;
	next = begin + (uint64_t)(s->interval * (double)hz);
	end = begin + (uint64_t)(s->seconds * (double)hz);
	do {
		unsigned work;

		now = rte_rdtsc();
		gap = RTE_MAX(gap, now - before);
		before = now;
		work = transmit(0, s, now);
		if (s->both)
			work += transmit(1, s, now);
		work += receive(0, s);
		if (s->both || s->storm)
			work += receive(1, s);
		if (s->storm)
			rage();
		loops++;
		empty += !work;
		if (now >= next && count < SAMPLES_MAX) {
			samples[count++] = (struct sample){
				.time = now_epoch(),
				.sent = directions[0].sent + directions[1].sent,
				.received = directions[0].received + directions[1].received,
				.longest_gap = gap,
			};
			gap = 0;
			next = now + (uint64_t)(s->interval * (double)hz);
		}
	} while (now < end && !(s->until_first && first_received > 0));
	stop = now_epoch();
	end = rte_rdtsc() + hz / 1000 * DRAIN_MS;
	while (rte_rdtsc() < end &&
	       directions[0].received + directions[1].received < directions[0].sent + directions[1].sent)
		if (receive(0, s) + receive(1, s))
			end = rte_rdtsc() + hz / 1000 * DRAIN_MS;
	print_result(s, start, stop, count, loops, empty);
}

/* Returns false for a key or a value that is not allowed. */
static bool set(struct settings *s, const char *key, const char *value)
{
	double v;
	char *rest;

	v = strtod(value, &rest);
	if (*rest || v < 0)
		return false;
	if (!strcmp(key, "seconds"))
		s->seconds = v;
	else if (!strcmp(key, "interval") && v > 0)
		s->interval = v;
	else if (!strcmp(key, "rate"))
		s->rate = v;
	else if (!strcmp(key, "size") && v >= FRAME_MIN && v <= FRAME_MAX)
		s->size = (unsigned)v;
	else if (!strcmp(key, "burst") && v >= 1 && v <= BURST_MAX)
		s->burst = (unsigned)v;
	else if (!strcmp(key, "stamp"))
		s->stamp = (unsigned)v;
	else if (!strcmp(key, "check"))
		s->check = (unsigned)v;
	else if (!strcmp(key, "sources") && v >= 1 && v <= STATIONS_MAX)
		s->sources = (uint32_t)v;
	else if (!strcmp(key, "destinations") && v >= 1 && v <= STATIONS_MAX)
		s->destinations = (uint32_t)v;
	else if (!strcmp(key, "until_first"))
		s->until_first = v > 0;
	else if (!strcmp(key, "both"))
		s->both = v > 0;
	else if (!strcmp(key, "shared"))
		s->shared = v > 0;
	else if (!strcmp(key, "storm"))
		s->storm = v > 0;
	else
		return false;
	return true;
}

static void command(char *line)
{
	struct settings s = {.seconds = 1, .interval = 0.05, .size = 64, .burst = 32, .stamp = 64, .check = 64,
			     .sources = 1, .destinations = 1};
	char *rest = NULL, *word = strtok_r(line, " \n", &rest);
	void (*action)(const struct settings *);

	if (!word)
		return;
	if (!strcmp(word, "quit"))
		exit(0);
	if (!strcmp(word, "run"))
		action = run;
	else if (!strcmp(word, "announce"))
		action = announce;
	else
		fail("a command is `run KEY=VALUE ...`, `announce KEY=VALUE ...` or `quit`");
	while ((word = strtok_r(NULL, " \n", &rest))) {
		char *value = strchr(word, '=');

		if (!value)
			fail("settings are KEY=VALUE");
		*value++ = 0;
		if (!set(&s, word, value)) {
			fprintf(stderr, "generator: %s=%s\n", word, value);
			fail("this setting is unknown or its value out of range; see the head of generator.c");
		}
	}
	if (s.storm && !storm_pool)
		fail("a storm needs a third port");
	action(&s);
}

static struct rte_mempool *pool(const char *name, unsigned side, unsigned buffers)
{
	char full[32];
	struct rte_mempool *p;

	snprintf(full, sizeof full, "%s%u", name, side);
	p = rte_pktmbuf_pool_create(full, buffers, buffers > 1024 ? 256 : 32, 0, RTE_MBUF_DEFAULT_BUF_SIZE, SOCKET_ID_ANY);
	if (!p)
		fail("no memory for buffers: give DPDK more (-m MEGABYTES)");
	return p;
}

static void attach(unsigned index, const char *arguments, double patience)
{
	struct rte_eth_conf configuration = {0};
	double deadline = now_epoch() + patience;
	char name[32];
	uint16_t port;

	snprintf(name, sizeof name, "net_virtio_user%u", index);
	while (rte_vdev_init(name, arguments)) {
		if (now_epoch() > deadline)
			fail("the back-end's socket did not accept in time");
		usleep(500);
	}
	if (rte_eth_dev_get_port_by_name(name, &port) || port != index)
		fail("ports are not numbered in the order of their creation");
	if (rte_eth_dev_configure(port, 1, 1, &configuration) ||
	    rte_eth_rx_queue_setup(port, 0, 0, SOCKET_ID_ANY, NULL, receive_pool) ||
	    rte_eth_tx_queue_setup(port, 0, 0, SOCKET_ID_ANY, NULL) || rte_eth_dev_start(port))
		fail("a port could not be set up; its messages stand above");
	rte_eth_promiscuous_enable(port);
}

int main(int argc, char **argv)
{
	const char *ports[PORTS_MAX];
	unsigned count = 0;
	double patience = 30;
	char line[1024];
	int used = rte_eal_init(argc, argv);

	if (used < 0)
		fail("DPDK did not start; its messages stand above");
	for (int i = used + 1; i + 1 < argc; i += 2) {
		if (!strcmp(argv[i], "--port") && count < PORTS_MAX)
			ports[count++] = argv[i + 1];
		else if (!strcmp(argv[i], "--patience"))
			patience = atof(argv[i + 1]);
		else if (!strcmp(argv[i], "--site"))
			site = (uint8_t)atoi(argv[i + 1]);
		else
			fail("options are --port VDEV-ARGUMENTS (2 to 32), --patience SECONDS and --site N");
	}
	if (count < SIDES)
		fail("two ports are needed: --port path=SOCKET,... twice");
	receive_pool = pool("receive", 0, 8191 + (count - SIDES) * 512);
	for (unsigned side = 0; side < SIDES; side++) {
		plain_pool[side] = pool("plain", side, 4095);
		stamped_pool[side] = pool("stamped", side, 1023);
	}
	if (count > STORM_PORT) {
		storm_pool = pool("storm", 0, 1023);
		rte_mempool_obj_iter(storm_pool, prepare_storm, NULL);
	}
	prepare(FRAME_MIN);
	printf("{\"event\":\"started\",\"time\":%.6f,\"tsc_hz\":%lu}\n", now_epoch(), rte_get_tsc_hz());
	fflush(stdout);
	for (unsigned i = 0; i < count; i++)
		attach(i, ports[i], patience);
	printf("{\"event\":\"ready\",\"time\":%.6f}\n", now_epoch());
	fflush(stdout);
	while (fgets(line, sizeof line, stdin))
		command(line);
	return 0;
}
