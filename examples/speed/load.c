/* TCP load from one thread over epoll. Every byte that comes back is checked.
 *
 *     load HOST PORT echo CONNECTIONS BYTES    SECONDS   send a message, receive it whole, again
 *     load HOST PORT op   CONNECTIONS OPERANDS SECONDS   connect, send a request, receive its reply, close, again
 *     load HOST PORT pipe CONNECTIONS OPERANDS SECONDS   send DEPTH requests in one write, receive the replies, again
 *     load HOST PORT bulk CONNECTIONS BYTES    SECONDS   send and receive as fast as both ways go, to an echo server
 *
 * HOST is an IPv4 address. Prints one line of JSON: "rate", replies per second once the server is warm (in bulk, each
 * BYTES are one reply); "failures", how many connections broke before their reply was there; "reason", what broke the
 * first of them. A wrong reply, or none at all, is a line on standard error and exit status 1.
 *
 * It is in C so that a server in Python cannot outrun it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define DEPTH 32     /* requests in flight on a connection, in pipe */
#define BULK_TURN 16 /* sends, then receives, before the next connection has its turn, in bulk */
#define BUFFER_SIZE (256 * 1024)
#define MAX_EVENTS 256
#define WARM_UP 0.3 /* seconds */

struct connection {
    int fd;
    /* Bytes of the message and of what has to come back for it; in bulk, bytes since the connection was opened. */
    uint64_t sent, received;
};

static enum { ECHO, OP, PIPE, BULK } kind;
static struct sockaddr_in server;
static int poller;

/* What is sent, and what has to come back for it. */
static char *message, *expected;
static size_t message_size, expected_size;
static size_t period; /* in bulk: after so many bytes the stream begins again */

static uint64_t bytes_received, failures;
static int first_failure; /* an errno; 0 for the end of the stream */

static void die(const char *why)
{
    fprintf(stderr, "load: %s\n", why);
    exit(1);
}

static void die_unless(bool good, const char *call)
{
    if (!good) {
        fprintf(stderr, "load: %s: %s\n", call, strerror(errno));
        exit(1);
    }
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static void open_connection(struct connection *c)
{
    c->sent = c->received = 0;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    die_unless(c->fd >= 0, "socket");
    const int on = 1;
    die_unless(setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0, "setsockopt");
    /* What fails at once fails for want of ports on our side, or because nobody listens: no rate can come of it. */
    die_unless(connect(c->fd, (struct sockaddr *)&server, sizeof server) == 0 || errno == EINPROGRESS, "connect");
    /* Edge-triggered, a connection needs no epoll_ctl(2) each time that it turns from sending to receiving; for that,
     * each turn has to go on until the kernel has no more. In bulk that could be never, and the other connections
     * would starve: level-triggered, one whose turn is over comes round again. */
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | (kind == BULK ? 0 : EPOLLET), .data.ptr = c};
    die_unless(epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event) == 0, "epoll_ctl");
}

static void reopen(struct connection *c)
{
    close(c->fd); /* which takes it out of epoll, too */
    open_connection(c);
}

static void fail(struct connection *c, int error)
{
    if (failures++ == 0)
        first_failure = error;
    reopen(c);
}

/* The next two return how many bytes the kernel moved, 0 if the server has to be waited for, and -1 if the connection
 * broke; then it is a new one. */

static ssize_t send_some(struct connection *c, const char *data, size_t size)
{
    ssize_t sent = send(c->fd, data, size, MSG_NOSIGNAL);
    if (sent < 0 && errno == EAGAIN)
        return 0;
    if (sent < 0)
        fail(c, errno);
    else
        c->sent += sent;
    return sent;
}

static ssize_t receive_some(struct connection *c, const char *due, size_t size)
{
    static char buffer[BUFFER_SIZE];
    ssize_t received = recv(c->fd, buffer, sizeof buffer, 0);
    if (received < 0 && errno == EAGAIN)
        return 0;
    if (received <= 0) {
        fail(c, received < 0 ? errno : 0);
        return -1;
    }
    if ((size_t)received > size || memcmp(buffer, due, received) != 0)
        die("wrong reply");
    c->received += received;
    bytes_received += received;
    return received;
}

/* Send the message and receive what is due, again and again, until the server has to be waited for. */
static void converse(struct connection *c)
{
    for (;;) {
        while (c->sent < message_size) {
            ssize_t sent = send_some(c, message + c->sent, message_size - c->sent);
            if (sent < 0)
                return;
            if (sent == 0)
                break;
        }
        while (c->received < expected_size)
            if (receive_some(c, expected + c->received, expected_size - c->received) <= 0)
                return;
        if (kind == OP) {
            reopen(c);
            return;
        }
        c->sent = c->received = 0;
    }
}

/* Keep both ways full for one turn. */
static void flood(struct connection *c)
{
    ssize_t moved = 1;
    for (int i = 0; i < BULK_TURN && moved > 0; i++)
        moved = send_some(c, message + c->sent % period, message_size);
    if (moved < 0)
        return;
    moved = 1;
    for (int i = 0; i < BULK_TURN && moved > 0; i++)
        moved = receive_some(c, expected + c->received % period, c->sent - c->received);
}

static void *allocate(size_t size)
{
    void *memory = calloc(1, size);
    die_unless(memory != NULL, "calloc");
    return memory;
}

/* A message for an echo server, and for bulk what follows it: stored so far that a call which begins anywhere in the
 * period can send a whole message, or compare a whole buffer. */
static void make_message(size_t size)
{
    message_size = expected_size = size;
    period = size + 1; /* not the size: a message that is lost or comes twice shows */
    size_t stored = period + size + BUFFER_SIZE;
    message = expected = allocate(stored);
    for (size_t i = 0; i < stored; i++) {
        size_t at = i % period;
        message[i] = (char)(at * 131 + at / 251); /* a byte that is lost or moved shows */
    }
}

/* `count` op requests for the same sum, and their replies. */
static void make_requests(size_t operands, size_t count)
{
    size_t request_size = 1 + 4 * operands + 1;
    message_size = count * request_size;
    expected_size = count * 4;
    message = allocate(message_size);
    expected = allocate(expected_size);
    uint32_t sum = 0; /* wraps as the protocol's does */
    message[0] = (char)operands;
    for (size_t i = 0; i < operands; i++) {
        uint32_t operand = (uint32_t)(i * 1000003 - 7), wire = htole32(operand);
        memcpy(message + 1 + 4 * i, &wire, 4);
        sum += operand;
    }
    message[request_size - 1] = '+';
    sum = htole32(sum);
    memcpy(expected, &sum, 4);
    for (size_t i = 1; i < count; i++) {
        memcpy(message + i * request_size, message, request_size);
        memcpy(expected + 4 * i, &sum, 4);
    }
}

/* Returns when it really ended. */
static double run_until(double end)
{
    struct epoll_event events[MAX_EVENTS];
    double time;
    while ((time = now()) < end) {
        int ready = epoll_wait(poller, events, MAX_EVENTS, 10 /* milliseconds */);
        for (int i = 0; i < ready; i++)
            (kind == BULK ? flood : converse)(events[i].data.ptr);
    }
    return time;
}

static void read_arguments(int argc, char **argv, long *connections, long *size, double *seconds)
{
    static const char *const kinds[] = {[ECHO] = "echo", [OP] = "op", [PIPE] = "pipe", [BULK] = "bulk"};
    if (argc != 7)
        die("usage: load HOST PORT echo|op|pipe|bulk CONNECTIONS SIZE SECONDS");
    server.sin_family = AF_INET;
    if (inet_pton(AF_INET, argv[1], &server.sin_addr) != 1)
        die("HOST is not an IPv4 address");
    server.sin_port = htons((uint16_t)atoi(argv[2]));
    for (kind = ECHO; strcmp(argv[3], kinds[kind]) != 0; kind++)
        if (kind == BULK)
            die("the kind of load is not echo, op, pipe or bulk");
    *connections = atol(argv[4]);
    *size = atol(argv[5]);
    *seconds = atof(argv[6]);
    if (*connections < 1 || *size < 1 || !(*seconds > 0))
        die("CONNECTIONS, SIZE and SECONDS are above 0");
    if ((kind == OP || kind == PIPE) && *size > 255)
        die("a request has at most 255 operands");
}

int main(int argc, char **argv)
{
    long connections, size;
    double seconds;
    read_arguments(argc, argv, &connections, &size, &seconds);
    if (kind == ECHO || kind == BULK)
        make_message(size);
    else
        make_requests(size, kind == PIPE ? DEPTH : 1);
    poller = epoll_create1(0);
    die_unless(poller >= 0, "epoll_create1");
    struct connection *all = allocate(connections * sizeof *all);
    for (long i = 0; i < connections; i++)
        open_connection(&all[i]);

    double began = run_until(now() + WARM_UP);
    uint64_t bytes_before = bytes_received;
    double ended = run_until(began + seconds);

    double reply_size = kind == ECHO || kind == BULK ? size : 4;
    double rate = (bytes_received - bytes_before) / reply_size / (ended - began);
    const char *reason = !failures ? "" : first_failure ? strerror(first_failure) : "end of stream";
    if (bytes_received == bytes_before) {
        fprintf(stderr, "load: no reply; connections that failed: %" PRIu64 " %s\n", failures, reason);
        return 1;
    }
    printf("{\"rate\": %.1f, \"failures\": %" PRIu64 ", \"reason\": \"%s\"}\n", rate, failures, reason);
    return 0;
}
