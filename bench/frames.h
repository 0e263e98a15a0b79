/*
 * The frames the generator sends, and how it recognises them again.
 *
 * Every frame is Ethernet + IPv4 + UDP between two *stations*. Station `n` of side `s` (the port it lives behind) has a
 * locally administered address and an IPv4 address derived from (s, n), so a run with many stations exercises a MAC
 * table, and a flow cache too, as many real machines would.
 *
 * Behind the UDP header stands an identity record of 22 bytes, so that it fits a 64-byte frame exactly; the rest of a
 * longer frame is a byte pattern that depends on the identity and the offset. There are two kinds of frame:
 *
 *   plain    written once when the buffers are prepared and sent again and again without being touched, because a
 *            generator that writes each frame would measure its own cache misses. Its whole content is known from its
 *            identity, so a receiver can verify any sample of them.
 *   stamped  one frame in `stamp` comes from a pool of its own and gets a sequence number and the time-stamp counter
 *            each time it is sent: reordering, duplication and latency are seen on these.
 *   storm    broadcast by a third port that wants to be in the way; the others put it aside.
 */
#ifndef VIADUCT_BENCH_FRAMES_H
#define VIADUCT_BENCH_FRAMES_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include <rte_byteorder.h>
#include <rte_ether.h>
#include <rte_ip.h>
#include <rte_udp.h>

#define FRAME_MIN 64u
#define FRAME_MAX 1518u
#define STATIONS_MAX 65536u
#define KIND_PLAIN 0x5649u
#define KIND_STAMPED 0x5653u
#define KIND_STORM 0x5654u

struct frame_head {
	struct rte_ether_hdr ether;
	struct rte_ipv4_hdr ip;
	struct rte_udp_hdr udp;
	uint32_t identity;
	uint16_t kind;
	uint64_t sequence; /* stamped frames only; otherwise part of the pattern */
	uint64_t sent;     /* time-stamp counter; likewise */
} __attribute__((packed, aligned(2)));

_Static_assert(sizeof(struct frame_head) == FRAME_MIN, "the head must fill the smallest frame");

/* Tells the stations of several generators on one switch apart. */
static uint8_t site;

/* The address of station `n` behind side `side`: 02:SS:56:NN:NN:NN, at another site 57 and so on. */
static inline void station_ether(struct rte_ether_addr *address, unsigned side, uint32_t n)
{
	uint8_t *b = address->addr_bytes;

	b[0] = 0x02;
	b[1] = (uint8_t)side;
	b[2] = (uint8_t)(0x56 + site);
	b[3] = (uint8_t)(n >> 16);
	b[4] = (uint8_t)(n >> 8);
	b[5] = (uint8_t)n;
}

/* 10.(16+side).NN.NN, in network order. */
static inline rte_be32_t station_ip(unsigned side, uint32_t n)
{
	return rte_cpu_to_be_32(RTE_IPV4(10, 16 + side, 0, 0) + n);
}

static inline rte_be16_t station_udp_port(uint32_t n)
{
	return rte_cpu_to_be_16((uint16_t)(1024 + (n & 0x3fff)));
}

/* Address a frame from station `source` of `side` to station `destination` of the other side, checksum included. */
static inline void frame_address(struct frame_head *f, unsigned side, uint32_t source, uint32_t destination)
{
	station_ether(&f->ether.src_addr, side, source);
	station_ether(&f->ether.dst_addr, !side, destination);
	f->ip.src_addr = station_ip(side, source);
	f->ip.dst_addr = station_ip(!side, destination);
	f->udp.src_port = station_udp_port(source);
	f->udp.dst_port = station_udp_port(destination);
	f->ip.hdr_checksum = 0;
	f->ip.hdr_checksum = rte_ipv4_cksum(&f->ip);
}

static inline uint64_t frame_mix(uint32_t identity)
{
	uint64_t x = identity + 0x9e3779b97f4a7c15ull;

	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	return x ^ (x >> 27);
}

static inline uint8_t frame_pattern(uint64_t mix, unsigned offset)
{
	return (uint8_t)((mix >> (offset & 31)) + offset);
}

/* Write the whole of a frame of `size` bytes. */
static inline void frame_write(void *data, unsigned size, unsigned side, uint32_t identity, uint16_t kind)
{
	struct frame_head *f = data;
	uint8_t *bytes = data;
	uint64_t mix = frame_mix(identity);

	memset(f, 0, sizeof *f);
	f->ether.ether_type = rte_cpu_to_be_16(RTE_ETHER_TYPE_IPV4);
	f->ip.version_ihl = 0x45;
	f->ip.total_length = rte_cpu_to_be_16((uint16_t)(size - sizeof f->ether));
	f->ip.time_to_live = 64;
	f->ip.next_proto_id = IPPROTO_UDP;
	f->udp.dgram_len = rte_cpu_to_be_16((uint16_t)(size - sizeof f->ether - sizeof f->ip));
	frame_address(f, side, 0, 0);
	f->identity = identity;
	f->kind = kind;
	f->sequence = mix;
	f->sent = ~mix;
	for (unsigned i = FRAME_MIN; i < size; i++)
		bytes[i] = frame_pattern(mix, i);
}

/*
 * Whether `data` is, byte for byte, a frame that side `side` sent with this size. Stations beyond the first differ in
 * their addresses, which are then checked for consistency: MAC, IPv4 address and UDP port must name the same station.
 */
static inline bool frame_is_intact(const void *data, unsigned length, unsigned size, unsigned side,
				   uint32_t sources, uint32_t destinations)
{
	struct frame_head got, want;
	const uint8_t *bytes = data;
	uint32_t source, destination;

	if (length != size)
		return false;
	memcpy(&got, data, sizeof got);
	if (got.kind != KIND_PLAIN && got.kind != KIND_STAMPED)
		return false;
	source = rte_be_to_cpu_32(got.ip.src_addr) - RTE_IPV4(10, 16 + side, 0, 0);
	destination = rte_be_to_cpu_32(got.ip.dst_addr) - RTE_IPV4(10, 16 + !side, 0, 0);
	if (source >= sources || destination >= destinations)
		return false;
	frame_write(&want, FRAME_MIN, side, got.identity, got.kind);
	want.ip.total_length = rte_cpu_to_be_16((uint16_t)(size - sizeof want.ether));
	want.udp.dgram_len = rte_cpu_to_be_16((uint16_t)(size - sizeof want.ether - sizeof want.ip));
	frame_address(&want, side, source, destination);
	if (got.kind == KIND_STAMPED) {
		want.sequence = got.sequence;
		want.sent = got.sent;
	}
	if (memcmp(&got, &want, sizeof got) != 0)
		return false;
	for (unsigned i = FRAME_MIN; i < size; i++)
		if (bytes[i] != frame_pattern(frame_mix(got.identity), i))
			return false;
	return true;
}

#endif
