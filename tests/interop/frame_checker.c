/* Sends frames through DPDK's virtio-user driver to a station that returns them, and checks every byte of what comes back.
 *
 *   frame_checker EAL-ARGUMENTS -- STATION FRAMES LONGEST WINDOW SEGMENTS
 *
 * One port. STATION is the MAC address of the station, which must swap the addresses and send each frame back in its order
 * (testpmd's macswap). The length of frame N and all its bytes follow from N, and so does the way in which it is cut into
 * segments, at most SEGMENTS. WINDOW frames may be under way. In every second round the receive ring is not looked at until the whole window
 * was sent: what the rings can hold must not be lost. The status is 0 when all came back once, in order and unchanged.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <rte_cycles.h>
#include <rte_eal.h>
#include <rte_ethdev.h>
#include <rte_ether.h>
#include <rte_mbuf.h>

enum { SHORTEST = 60, BURST = 32, RING = 256, POOL = 8191, PATIENCE = 20 /* seconds without a frame */ };
#define ETHERTYPE 0x88b5 /* IEEE 802: local experimental */

static struct rte_ether_addr own, station;
static struct rte_mempool *pool;
static uint32_t longest, segments;

static uint64_t mix(uint64_t z)
{
	z = (z + 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static uint32_t length_of(uint64_t number)
{
	if (number % 16 == 0)
		return SHORTEST;
	if (number % 16 == 1)
		return longest;
	return SHORTEST + mix(number) % (longest - SHORTEST + 1);
}

/* The frame as it is expected back, addresses included; what is sent differs in their order. */
static void expected(uint8_t *to, uint64_t number, uint32_t length)
{
	struct rte_ether_hdr *header = (void *)to;
	header->dst_addr = own;
	header->src_addr = station;
	header->ether_type = rte_cpu_to_be_16(ETHERTYPE);
	memcpy(to + sizeof *header, &number, sizeof number);
	for (uint32_t at = sizeof *header + sizeof number; at < length; at += 8) {
		uint64_t word = mix(number << 20 | at);
		memcpy(to + at, &word, length - at < 8 ? length - at : 8);
	}
}

/* The frame to send, in one segment or in several of uneven length. */
static struct rte_mbuf *made(uint64_t number)
{
	static uint8_t frame[65536];
	uint32_t length = length_of(number), room = 1800;
	struct rte_mbuf *first = NULL, *last = NULL;
	struct rte_ether_hdr *header = (void *)frame;
	expected(frame, number, length);
	header->dst_addr = station;
	header->src_addr = own;
	if (number % 4 == 3)
		room = 64 + mix(number) % 900;
	if (room * segments < length)
		room = length / segments + 1;
	for (uint32_t at = 0; at < length;) {
		uint32_t part = length - at < room ? length - at : room;
		struct rte_mbuf *m = rte_pktmbuf_alloc(pool);
		if (!m)
			rte_exit(2, "frame_checker: no packet buffer left\n");
		memcpy(rte_pktmbuf_append(m, part), frame + at, part);
		if (first) {
			last->next = m;
			first->nb_segs++;
			first->pkt_len += part;
		} else {
			first = m;
		}
		last = m;
		at += part;
	}
	return first;
}

static int is_right(const struct rte_mbuf *m, uint64_t number)
{
	static uint8_t want[65536], got[65536];
	uint32_t length = length_of(number), at = 0;
	if (m->pkt_len > sizeof got)
		return 0;
	for (const struct rte_mbuf *part = m; part; part = part->next) {
		memcpy(got + at, rte_pktmbuf_mtod(part, void *), part->data_len);
		at += part->data_len;
	}
	expected(want, number, length);
	if (m->pkt_len == length && !memcmp(got, want, length))
		return 1;
	uint64_t found;
	memcpy(&found, got + sizeof(struct rte_ether_hdr), sizeof found);
	for (at = 0; at < length && at < m->pkt_len && got[at] == want[at]; at++)
		;
	printf("WRONG: expected frame %lu of %u bytes, got one of %u bytes that says it is %lu; the first difference is at byte %u\n",
	       number, length, m->pkt_len, found, at);
	return 0;
}

int main(int count, char **arguments)
{
	int used = rte_eal_init(count, arguments);
	if (used < 0 || count - used != 6 || rte_ether_unformat_addr(arguments[used + 1], &station))
		rte_exit(2, "usage: frame_checker EAL-ARGUMENTS -- STATION FRAMES LONGEST WINDOW SEGMENTS\n");
	uint64_t frames = strtoull(arguments[used + 2], NULL, 10), window = strtoull(arguments[used + 4], NULL, 10);
	longest = atoi(arguments[used + 3]);
	segments = atoi(arguments[used + 5]);

	struct rte_eth_conf configuration = { .rxmode = { .mtu = longest > 1514 ? longest - 14 : 1500 } };
	struct rte_eth_dev_info info;
	struct rte_eth_link link = { 0 };
	pool = rte_pktmbuf_pool_create("frames", POOL, 0, 0, RTE_MBUF_DEFAULT_BUF_SIZE, 0);
	if (!pool || rte_eth_dev_count_avail() != 1 || rte_eth_dev_info_get(0, &info))
		rte_exit(2, "frame_checker: one port is needed\n");
	configuration.txmode.offloads = info.tx_offload_capa & RTE_ETH_TX_OFFLOAD_MULTI_SEGS;
	if (longest > 1514)
		configuration.rxmode.offloads = info.rx_offload_capa & RTE_ETH_RX_OFFLOAD_SCATTER;
	if (rte_eth_dev_configure(0, 1, 1, &configuration) || rte_eth_rx_queue_setup(0, 0, RING, 0, NULL, pool) ||
	    rte_eth_tx_queue_setup(0, 0, RING, 0, NULL) || rte_eth_dev_start(0) || rte_eth_macaddr_get(0, &own))
		rte_exit(2, "frame_checker: the port does not start\n");
	for (int i = 0; i < 1000 && !link.link_status; i++) {
		rte_eth_link_get_nowait(0, &link);
		usleep(10000);
	}
	puts("link up");
	fflush(stdout);

	struct rte_mbuf *burst[BURST];
	uint64_t sent = 0, back = 0, last = rte_rdtsc(), patience = PATIENCE * rte_get_tsc_hz(), announced = 0;
	int wrong = 0;
	while (back < frames && !wrong) {
		uint64_t round = sent / window, progress = 0;
		while (sent < frames && sent - back < window) {
			struct rte_mbuf *m = made(sent);
			if (rte_eth_tx_burst(0, 0, &m, 1) == 1) {
				sent++;
				progress = 1;
				continue;
			}
			rte_pktmbuf_free(m); /* the ring is full: that is no loss; made again later */
			break;
		}
		if (sent >= window && !announced) {
			announced = 1;
			puts("window sent");
			fflush(stdout);
		}
		if (round % 2 && progress && sent < frames && sent - back < window)
			continue;
		uint16_t n = rte_eth_rx_burst(0, 0, burst, BURST);
		for (uint16_t i = 0; i < n; i++) {
			const struct rte_ether_hdr *header = rte_pktmbuf_mtod(burst[i], const struct rte_ether_hdr *);
			if (header->ether_type == rte_cpu_to_be_16(ETHERTYPE)) {
				wrong |= !is_right(burst[i], back);
				back++;
			}
			rte_pktmbuf_free(burst[i]);
		}
		if (n || progress)
			last = rte_rdtsc();
		else if (rte_rdtsc() - last > patience)
			break;
		else
			usleep(50);
	}
	printf("RESULT: %lu sent, %lu back, %s\n", sent, back, wrong ? "one wrong" : back < frames ? "some lost" : "all right");
	rte_eth_dev_stop(0);
	rte_eth_dev_close(0);
	rte_eal_cleanup();
	return wrong || back < frames;
}
