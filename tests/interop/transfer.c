/* Transfers whose every byte is checked, for the guests of the interoperability tests.
 *
 * Runs inside the guest, statically linked, beside busybox. A stream is a sequence of 64-bit words that depend on a seed and on
 * their place only, so the receiver needs no copy of what was sent and can say where the first wrong byte is.
 *
 *   transfer serve PORT                        accept TCP streams and echo UDP datagrams, IPv4 and IPv6, until killed
 *   transfer park PORT FILE                    accept one TCP stream, and read it once FILE exists
 *   transfer send HOST PORT MIB FLOWS          MIB mebibytes of TCP in FLOWS connections at once; status 0 if all arrived right
 *   transfer pump HOST PORT FILE KIB           one TCP stream, KIB kibibytes every 20 ms, until FILE exists; status 0 if all
 *                                              arrived right
 *   transfer echo HOST PORT COUNT SIZE         COUNT datagrams of SIZE bytes, one after the other, each compared when it returns
 *   transfer reach HOST PORT MILLISECONDS      a datagram every so often, until one of them returns
 *   transfer sniff INTERFACE MILLISECONDS      what the driver hands to the kernel: frames, longest, and those whose virtio-net
 *                                              header still asks for a checksum or for segmentation; SIGTERM ends it early
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/ethtool.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/sockios.h>
#include <linux/virtio_net.h>

enum { CHUNK = 256 * 1024 };                    /* a multiple of 8: words never straddle two chunks */
enum { PAUSE = 20 };                            /* milliseconds between two pieces of a paced stream */
struct announcement { uint64_t seed, bytes; };  /* the first 16 bytes of a stream */
static const uint64_t UNTIL_THE_END = UINT64_MAX; /* as the number of bytes: as many as come */

static uint64_t word(uint64_t seed, uint64_t place)
{
	uint64_t z = seed + (place + 1) * 0x9e3779b97f4a7c15ull;
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	return z ^ (z >> 29);
}

static void fill(uint64_t *to, uint64_t seed, uint64_t offset, size_t bytes)
{
	for (size_t i = 0; i < (bytes + 7) / 8; i++)
		to[i] = word(seed, offset / 8 + i);
}

static void fail(const char *what)
{
	fprintf(stderr, "transfer: %s: %s\n", what, strerror(errno));
	exit(1);
}

static socklen_t address(struct sockaddr_storage *to, const char *host, int port)
{
	struct sockaddr_in *v4 = (void *)to;
	struct sockaddr_in6 *v6 = (void *)to;
	memset(to, 0, sizeof *to);
	if (inet_pton(AF_INET, host, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(port);
		return sizeof *v4;
	}
	if (inet_pton(AF_INET6, host, &v6->sin6_addr) != 1) {
		fprintf(stderr, "transfer: %s is no IPv4 or IPv6 address\n", host);
		exit(2);
	}
	v6->sin6_family = AF_INET6;
	v6->sin6_port = htons(port);
	return sizeof *v6;
}

/* How many bytes came before the end. */
static size_t read_some(int fd, void *to, size_t bytes)
{
	size_t got = 0;
	while (got < bytes) {
		ssize_t n = read(fd, (char *)to + got, bytes - got);
		if (n <= 0)
			break;
		got += n;
	}
	return got;
}

static void write_all(int fd, const void *from, size_t bytes)
{
	for (size_t done = 0; done < bytes;) {
		ssize_t n = write(fd, (const char *)from + done, bytes - done);
		if (n < 0)
			fail("write");
		done += n;
	}
}

/* Receive one stream and answer with one line: "right" or what is wrong. */
static void receive_stream(int fd)
{
	static uint64_t got[CHUNK / 8], want[CHUNK / 8];
	struct announcement a;
	char verdict[128] = "right\n";
	if (read_some(fd, &a, sizeof a) < sizeof a)
		return;
	for (uint64_t offset = 0; offset < a.bytes; offset += CHUNK) {
		size_t n = a.bytes - offset < CHUNK ? a.bytes - offset : CHUNK;
		size_t came = read_some(fd, got, n);
		if (came < n && a.bytes != UNTIL_THE_END) {
			snprintf(verdict, sizeof verdict, "ended in the chunk at byte %llu\n", (unsigned long long)offset);
			break;
		}
		if (came < n)
			a.bytes = offset + (n = came);
		fill(want, a.seed, offset, n);
		if (memcmp(got, want, n)) {
			size_t at = 0;
			while (((char *)got)[at] == ((char *)want)[at])
				at++;
			snprintf(verdict, sizeof verdict, "first wrong byte at %llu\n", (unsigned long long)(offset + at));
			break;
		}
	}
	write_all(fd, verdict, strlen(verdict));
	shutdown(fd, SHUT_WR);
}

static int bound(int type, int port)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_ANY_INIT };
	int one = 1, fd = socket(AF_INET6, type, 0);
	if (fd < 0)
		fail("socket");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(fd, (void *)&any, sizeof any) < 0)
		fail("bind");
	return fd;
}

static int serve(int port)
{
	int tcp = bound(SOCK_STREAM, port), udp = bound(SOCK_DGRAM, port);
	static char datagram[65536];
	if (listen(tcp, 64) < 0)
		fail("listen");
	signal(SIGCHLD, SIG_IGN);
	for (;;) {
		struct pollfd ready[2] = { { .fd = tcp, .events = POLLIN }, { .fd = udp, .events = POLLIN } };
		if (poll(ready, 2, -1) < 0)
			continue;
		if (ready[0].revents) {
			int fd = accept(tcp, NULL, NULL);
			if (fd >= 0 && fork() == 0) {
				receive_stream(fd);
				_exit(0);
			}
			close(fd);
		}
		if (ready[1].revents) {
			struct sockaddr_storage from;
			socklen_t length = sizeof from;
			ssize_t n = recvfrom(udp, datagram, sizeof datagram, 0, (void *)&from, &length);
			if (n >= 0)
				sendto(udp, datagram, n, 0, (void *)&from, length);
		}
	}
}

/* A stream that waits in the kernel's receive buffer, of up to 8 MiB. */
static int park(int port, const char *file)
{
	int size = 8 << 20, tcp = bound(SOCK_STREAM, port);
	if (setsockopt(tcp, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) < 0)
		fail("SO_RCVBUFFORCE");
	if (listen(tcp, 1) < 0)
		fail("listen");
	int fd = accept(tcp, NULL, NULL);
	if (fd < 0)
		fail("accept");
	while (access(file, F_OK) < 0)
		usleep(PAUSE * 1000);
	receive_stream(fd);
	return 0;
}

static int announce_stream(const char *host, int port, uint64_t bytes, uint64_t seed)
{
	struct sockaddr_storage to;
	socklen_t length = address(&to, host, port);
	struct announcement a = { seed, bytes };
	int fd = socket(to.ss_family, SOCK_STREAM, 0);
	if (fd < 0 || connect(fd, (void *)&to, length) < 0)
		fail("connect");
	write_all(fd, &a, sizeof a);
	return fd;
}

/* Read the answer of `receive_stream`; the exit status. */
static int judge_stream(int fd, const char *host, uint64_t seed)
{
	char verdict[128] = "";
	for (size_t got = 0; got < sizeof verdict - 1;) {
		ssize_t n = read(fd, verdict + got, sizeof verdict - 1 - got);
		if (n <= 0)
			break;
		got += n;
	}
	if (strcmp(verdict, "right\n")) {
		fprintf(stderr, "transfer: the stream of seed %llu to %s: %s\n", (unsigned long long)seed, host, *verdict ? verdict : "no verdict");
		return 1;
	}
	return 0;
}

static int send_stream(const char *host, int port, uint64_t bytes, uint64_t seed)
{
	static uint64_t data[CHUNK / 8];
	int fd = announce_stream(host, port, bytes, seed);
	for (uint64_t offset = 0; offset < bytes; offset += CHUNK) {
		size_t n = bytes - offset < CHUNK ? bytes - offset : CHUNK;
		fill(data, seed, offset, n);
		write_all(fd, data, n);
	}
	return judge_stream(fd, host, seed);
}

/* One stream of unknown length, with pauses between pieces of at most CHUNK bytes, until `file` exists. */
static int pump(const char *host, int port, const char *file, size_t piece)
{
	static uint64_t data[CHUNK / 8];
	const uint64_t seed = (uint64_t)getpid() << 32 | (uint32_t)time(NULL);
	int fd = announce_stream(host, port, UNTIL_THE_END, seed);
	uint64_t offset = 0;
	for (; access(file, F_OK) < 0; offset += piece) {
		fill(data, seed, offset, piece);
		write_all(fd, data, piece);
		usleep(PAUSE * 1000);
	}
	shutdown(fd, SHUT_WR);
	printf("%.1f MiB\n", offset / 1048576.0);
	return judge_stream(fd, host, seed);
}

static int send_streams(const char *host, int port, uint64_t bytes, int flows)
{
	int wrong = 0, status;
	struct timespec begin, end;
	clock_gettime(CLOCK_MONOTONIC, &begin);
	for (int i = 0; i < flows; i++)
		if (fork() == 0)
			_exit(send_stream(host, port, bytes / flows, ((uint64_t)begin.tv_nsec << 20) + i));
	while (wait(&status) > 0)
		wrong |= status;
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%.1f MiB/s\n", bytes / 1048576.0 / (end.tv_sec - begin.tv_sec + (end.tv_nsec - begin.tv_nsec) / 1e9));
	return wrong ? 1 : 0;
}

static int echo(const char *host, int port, int count, size_t size)
{
	static uint64_t sent[8192], got[8192];
	struct sockaddr_storage to;
	socklen_t length = address(&to, host, port);
	struct timeval patience = { .tv_sec = 10 };
	int fd = socket(to.ss_family, SOCK_DGRAM, 0);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	if (connect(fd, (void *)&to, length) < 0)
		fail("connect");
	for (int i = 0; i < count; i++) {
		fill(sent, i, 0, size);
		if (send(fd, sent, size, 0) < 0)
			fail("send");
		ssize_t n = recv(fd, got, sizeof got, 0);
		if (n != (ssize_t)size || memcmp(sent, got, size)) {
			fprintf(stderr, "transfer: datagram %d of %zu bytes to %s: %s\n", i, size, host, n < 0 ? "lost" : "damaged");
			return 1;
		}
	}
	return 0;
}

static int reach(const char *host, int port, int milliseconds)
{
	struct sockaddr_storage to;
	socklen_t length = address(&to, host, port);
	char datagram = 0;
	int fd = socket(to.ss_family, SOCK_DGRAM, 0);
	struct pollfd ready = { .fd = fd, .events = POLLIN };
	do {
		/* An error says that the link is down, or that an earlier datagram was refused. */
		sendto(fd, &datagram, sizeof datagram, 0, (void *)&to, length);
		if (poll(&ready, 1, milliseconds) < 0)
			fail("poll");
	} while (!(ready.revents & POLLIN) || recv(fd, &datagram, sizeof datagram, 0) < 0);
	return 0;
}

static volatile sig_atomic_t enough;

static void stop_sniffing(int signal)
{
	(void)signal;
	enough = 1;
}

static int sniff(const char *interface, int milliseconds)
{
	static uint8_t frame[70000];
	int one = 1, frames = 0, checksum = 0, segmentation = 0;
	ssize_t longest = 0;
	struct sockaddr_ll at = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL), .sll_ifindex = if_nametoindex(interface) };
	struct timespec now, end;
	int size = 16 << 20, fd = socket(AF_PACKET, SOCK_RAW, 0);
	if (fd < 0 || setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof one) < 0 || bind(fd, (void *)&at, sizeof at) < 0)
		fail("packet socket");
	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
	/* The kernel itself would join segments again before we see them (generic receive offload). */
	struct ethtool_value off = { .cmd = ETHTOOL_SGRO };
	struct ifreq request = { .ifr_data = (void *)&off };
	strncpy(request.ifr_name, interface, sizeof request.ifr_name - 1);
	if (ioctl(fd, SIOCETHTOOL, &request) < 0)
		fail("ETHTOOL_SGRO");
	signal(SIGTERM, stop_sniffing);
	puts("sniffing");
	fflush(stdout);
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += milliseconds / 1000;
	end.tv_nsec += milliseconds % 1000 * 1000000L;
	for (;;) {
		struct pollfd ready = { .fd = fd, .events = POLLIN };
		struct sockaddr_ll from;
		socklen_t length = sizeof from;
		clock_gettime(CLOCK_MONOTONIC, &now);
		long left = (end.tv_sec - now.tv_sec) * 1000 + (end.tv_nsec - now.tv_nsec) / 1000000;
		if (enough || left <= 0)
			break;
		if (poll(&ready, 1, left < 100 ? left : 100) <= 0)
			continue;
		ssize_t n = recvfrom(fd, frame, sizeof frame, 0, (void *)&from, &length);
		if (n < (ssize_t)sizeof(struct virtio_net_hdr) || from.sll_pkttype == PACKET_OUTGOING)
			continue;
		struct virtio_net_hdr *header = (void *)frame;
		n -= sizeof *header;
		frames++;
		checksum += !!(header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM);
		segmentation += header->gso_type != VIRTIO_NET_HDR_GSO_NONE;
		longest = n > longest ? n : longest;
	}
	printf("frames=%d longest=%zd checksum=%d segmentation=%d\n", frames, longest, checksum, segmentation);
	return 0;
}

int main(int count, char **arguments)
{
	signal(SIGPIPE, SIG_IGN);
	if (count == 3 && !strcmp(arguments[1], "serve"))
		return serve(atoi(arguments[2]));
	if (count == 4 && !strcmp(arguments[1], "park"))
		return park(atoi(arguments[2]), arguments[3]);
	if (count == 6 && !strcmp(arguments[1], "send"))
		return send_streams(arguments[2], atoi(arguments[3]), (uint64_t)atoi(arguments[4]) << 20, atoi(arguments[5]));
	if (count == 6 && !strcmp(arguments[1], "pump") && atoi(arguments[5]) > 0 && atoi(arguments[5]) <= CHUNK / 1024)
		return pump(arguments[2], atoi(arguments[3]), arguments[4], (size_t)atoi(arguments[5]) * 1024);
	if (count == 6 && !strcmp(arguments[1], "echo"))
		return echo(arguments[2], atoi(arguments[3]), atoi(arguments[4]), atoi(arguments[5]));
	if (count == 5 && !strcmp(arguments[1], "reach") && atoi(arguments[4]) > 0)
		return reach(arguments[2], atoi(arguments[3]), atoi(arguments[4]));
	if (count == 4 && !strcmp(arguments[1], "sniff"))
		return sniff(arguments[2], atoi(arguments[3]));
	fputs("usage: transfer serve PORT | park PORT FILE | send HOST PORT MIB FLOWS | pump HOST PORT FILE KIB | echo HOST PORT COUNT SIZE | "
	      "reach HOST PORT MILLISECONDS | sniff INTERFACE MILLISECONDS\n", stderr);
	return 2;
}
