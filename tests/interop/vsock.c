/* A pipe through an AF_VSOCK socket: `vsock listen PORT` accepts one connection, `vsock connect CID PORT` makes one. What is
 * read from standard input is sent, and the socket's sending direction closed at its end; what is received is written to
 * standard output until the other side has closed too. Leaves with status 0 if both directions ended in order. */
#include <errno.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void fail(const char *what)
{
    fprintf(stderr, "vsock: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void write_all(int fd, const char *data, ssize_t size)
{
    while (size > 0) {
        ssize_t done = write(fd, data, size);
        if (done < 0)
            fail("write");
        data += done;
        size -= done;
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
    int listens = argc == 3 && !strcmp(argv[1], "listen");
    if (!listens && !(argc == 4 && !strcmp(argv[1], "connect"))) {
        fprintf(stderr, "usage: vsock listen PORT | vsock connect CID PORT\n");
        return 2;
    }
    address.svm_port = strtoul(argv[argc - 1], NULL, 0);
    int sock = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (sock < 0)
        fail("socket");
    if (listens) {
        if (bind(sock, (void *)&address, sizeof address) || listen(sock, 8))
            fail("listen");
        fprintf(stderr, "listening\n");
        sock = accept(sock, NULL, NULL);
        if (sock < 0)
            fail("accept");
    } else {
        address.svm_cid = strtoul(argv[2], NULL, 0);
        if (connect(sock, (void *)&address, sizeof address))
            fail("connect");
    }
    static char buffer[65536];
    struct pollfd ends[2] = { { .fd = 0, .events = POLLIN }, { .fd = sock, .events = POLLIN } };
    while (ends[0].fd >= 0 || ends[1].fd >= 0) {
        if (poll(ends, 2, -1) < 0)
            fail("poll");
        for (int from = 0; from < 2; from++) {
            if (ends[from].fd < 0 || !ends[from].revents)
                continue;
            ssize_t size = read(ends[from].fd, buffer, sizeof buffer);
            if (size < 0)
                fail(from ? "receive" : "read");
            if (size == 0) {
                ends[from].fd = -1;
                if (from == 1)
                    close(1); /* whoever reads it sees the end, and may go on talking to our standard input */
                if (from == 0 && shutdown(sock, SHUT_WR) && errno != ENOTCONN)
                    fail("shutdown");
            } else {
                write_all(from ? 1 : sock, buffer, size);
            }
        }
    }
    return 0;
}
