/*
 * A TCP stream that costs its two ends as little as possible, so that what lies between them shows. Linked statically: it
 * runs in a guest beside busybox as well as on the host.
 *
 *   stream serve PORT                  count and judge streams, one process for each, and echo datagrams, until killed
 *   stream send HOST PORT SECONDS      send for so long; prints one JSON object when the server has counted everything
 *   stream probe HOST PORT SECONDS     a numbered datagram each 2 ms; prints the longest time without an answer
 *
 * The content is one block, again and again. The sender hands the block's pages to the kernel (sendfile), the receiver
 * lets the kernel throw the bytes away (recv with MSG_TRUNC, tcp(7)) except for the first part of each block, which it
 * compares. A frame lost, doubled or displaced by the network would be mended by TCP; what it damaged and TCP's checksum
 * did not show is found here.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 1 << 20, COMPARED = 1 << 16 };
#define PROBE_SECONDS 0.002

struct verdict {
	uint64_t bytes, compared, damaged;
};

static uint64_t block[BLOCK / sizeof(uint64_t)];

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "stream: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void fill(void)
{
	for (uint64_t i = 0; i < BLOCK / sizeof *block; i++)
		block[i] = (i + 1) * 0x9e3779b97f4a7c15u;
}

static void judge(int stream)
{
	static char received[COMPARED];
	struct verdict v = {0};

	for (;;) {
		size_t at = v.bytes % BLOCK;
		ssize_t n;

		if (at < COMPARED) {
			n = recv(stream, received, COMPARED - at, 0);
			if (n > 0) {
				v.compared += (uint64_t)n;
				for (ssize_t i = 0; i < n; i++)
					v.damaged += received[i] != ((char *)block)[at + (size_t)i];
			}
		} else {
			n = recv(stream, received, BLOCK - at, MSG_TRUNC);
		}
		if (n < 0)
			fail("recv");
		if (n == 0)
			break;
		v.bytes += (uint64_t)n;
	}
	if (send(stream, &v, sizeof v, 0) != sizeof v)
		fail("the verdict cannot be sent");
}

static void echo(uint16_t port)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)}, from;
	int datagrams = socket(AF_INET, SOCK_DGRAM, 0);
	char content[2048];

	if (bind(datagrams, (struct sockaddr *)&to, sizeof to))
		fail("the port cannot be had");
	for (;;) {
		socklen_t length = sizeof from;
		ssize_t n = recvfrom(datagrams, content, sizeof content, 0, (struct sockaddr *)&from, &length);

		if (n >= 0)
			sendto(datagrams, content, (size_t)n, 0, (struct sockaddr *)&from, length);
	}
}

static void serve(uint16_t port)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
	int listening = socket(AF_INET, SOCK_STREAM, 0), yes = 1;

	signal(SIGCHLD, SIG_IGN);
	if (fork() == 0)
		echo(port);
	setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
	if (bind(listening, (struct sockaddr *)&to, sizeof to) || listen(listening, 8))
		fail("the port cannot be had");
	for (;;) {
		int stream = accept(listening, NULL, NULL);

		if (stream < 0)
			fail("accept");
		if (fork() == 0) {
			judge(stream);
			exit(0);
		}
		close(stream);
	}
}

static void probe(const char *host, uint16_t port, double seconds)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
	int datagrams = socket(AF_INET, SOCK_DGRAM, 0);
	uint64_t sent = 0, answered = 0, doubled = 0, number;
	double begin = now(), next = begin, last = begin, longest = 0, end;
	uint8_t *seen = calloc(1, (size_t)(seconds / PROBE_SECONDS) + 2);

	if (inet_pton(AF_INET, host, &to.sin_addr) != 1 || !seen)
		fail("the host is an IPv4 address");
	while ((end = now()) < begin + seconds) {
		struct pollfd waiting = {.fd = datagrams, .events = POLLIN};

		if (end >= next && sent < (uint64_t)(seconds / PROBE_SECONDS)) {
			sendto(datagrams, &sent, sizeof sent, MSG_DONTWAIT, (struct sockaddr *)&to, sizeof to);
			sent++;
			next += PROBE_SECONDS;
		}
		poll(&waiting, 1, 1);
		while (recv(datagrams, &number, sizeof number, MSG_DONTWAIT) == sizeof number) {
			if (number >= sent || seen[number]++) {
				doubled++;
				continue;
			}
			answered++;
			end = now();
			if (end - last > longest)
				longest = end - last;
			last = end;
		}
	}
	printf("{\"sent\":%" PRIu64 ",\"answered\":%" PRIu64 ",\"doubled\":%" PRIu64 ",\"longest\":%.4f,\"silent\":%.4f}\n",
	       sent, answered, doubled, longest, end - last);
}

static void send_for(const char *host, uint16_t port, double seconds)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
	int stream = socket(AF_INET, SOCK_STREAM, 0), file = memfd_create("block", 0);
	struct verdict v;
	uint64_t sent = 0;
	double begin;

	if (inet_pton(AF_INET, host, &to.sin_addr) != 1)
		fail("the host is an IPv4 address");
	if (file < 0 || write(file, block, BLOCK) != BLOCK)
		fail("memory for the content");
	if (connect(stream, (struct sockaddr *)&to, sizeof to))
		fail("connect");
	begin = now();
	while (now() < begin + seconds) {
		off_t at = (off_t)(sent % BLOCK);
		ssize_t n = sendfile(stream, file, &at, BLOCK - (size_t)at);

		if (n <= 0)
			fail("sendfile");
		sent += (uint64_t)n;
	}
	if (shutdown(stream, SHUT_WR) || recv(stream, &v, sizeof v, MSG_WAITALL) != sizeof v)
		fail("the server did not answer");
	printf("{\"seconds\":%.6f,\"sent\":%" PRIu64 ",\"received\":%" PRIu64 ",\"compared\":%" PRIu64 ",\"damaged\":%" PRIu64
	       "}\n",
	       now() - begin, sent, v.bytes, v.compared, v.damaged);
}

int main(int argc, char **argv)
{
	fill();
	signal(SIGPIPE, SIG_IGN);
	if (argc == 3 && !strcmp(argv[1], "serve"))
		serve((uint16_t)atoi(argv[2]));
	else if (argc == 5 && !strcmp(argv[1], "send"))
		send_for(argv[2], (uint16_t)atoi(argv[3]), atof(argv[4]));
	else if (argc == 5 && !strcmp(argv[1], "probe"))
		probe(argv[2], (uint16_t)atoi(argv[3]), atof(argv[4]));
	else
		fprintf(stderr, "usage: stream serve PORT | stream send HOST PORT SECONDS | stream probe HOST PORT SECONDS\n");
	return argc == 5 ? 0 : 2;
}
