/* TCP load from one thread with epoll. Every received byte is checked. With -DTLS, it uses TLS 1.3.
 *
 *     load HOST PORT echo CONNECTIONS BYTES    SECONDS   send a message, receive it, repeat
 *     load HOST PORT op   CONNECTIONS OPERANDS SECONDS   connect, send a request, receive its reply, close, repeat
 *     load HOST PORT pipe CONNECTIONS OPERANDS SECONDS   send DEPTH requests in one write, receive the replies, repeat
 *     load HOST PORT bulk CONNECTIONS BYTES    SECONDS   send to an echo server and receive, as fast as possible
 *
 * HOST is one of this machine's loopback addresses, 127.x.x.x. Prints one line of JSON:
 *
 *     "rate"      replies per second, after the warm-up; in bulk, each BYTES count as one reply
 *     "p50"       median latency in microseconds: from the start of sending a message, or in op of opening its
 *                 connection, until its reply is complete; null in bulk
 *     "p99"       99th percentile of the latency
 *     "busy"      share of the time in which this program used the CPU; near 1, it limits the rate
 *     "failures"  how many connections broke before their reply was complete
 *     "reason"    why the first of them broke
 *
 * With a wrong reply, or none at all, it prints a line on standard error and exits with status 1.
 *
 * It is in C so that it is faster than a server in Python.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#endif

#define DEPTH 32     /* requests in flight on a connection, in pipe */
#define BULK_TURN 16 /* sends, then receives, before the next connection's turn, in bulk */
#define BUFFER_SIZE (256 * 1024)
#define MAX_EVENTS 256
#define WARM_UP 0.3 /* seconds */
#define ADDRESSES 200
#define LONGEST 1000000 /* microseconds; longer latencies count as this */

struct connection {
    int fd;
#ifdef TLS
    SSL *tls;
#endif
    double began; /* start of sending the message, or in op of opening the connection */
    /* Bytes of the message and of its reply; in bulk, bytes since the connection was opened. */
    uint64_t sent, received;
};

static enum { ECHO, OP, PIPE, BULK } kind;
static struct sockaddr_in server;
static int poller;

/* What is sent, and the expected reply. */
static char *message, *expected;
static size_t message_size, expected_size;
static size_t period; /* in bulk: the stream repeats after this many bytes */

static uint64_t bytes_received, failures;
static int first_failure; /* an errno; 0 for end of stream */
static bool warm;     /* the warm-up is over: measure from now on */
static uint64_t latencies[LONGEST + 1]; /* count per microsecond; the last, LONGEST or more */

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

static double read_clock(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static double now(void) { return read_clock(CLOCK_MONOTONIC); }

/* How bytes move over a connection: write_some and read_some return what write(2) and read(2) would. */
#ifdef TLS

static SSL_CTX *tls_settings;

static void prepare(void)
{
    tls_settings = SSL_CTX_new(TLS_client_method());
    if (tls_settings == NULL)
        die("SSL_CTX_new failed");
    SSL_CTX_set_min_proto_version(tls_settings, TLS1_3_VERSION);
    SSL_CTX_set_session_cache_mode(tls_settings, SSL_SESS_CACHE_OFF); /* no resumption */
    SSL_CTX_set_mode(tls_settings, SSL_MODE_ENABLE_PARTIAL_WRITE);
}

static void begin(struct connection *c)
{
    c->tls = SSL_new(tls_settings);
    if (c->tls == NULL || !SSL_set_fd(c->tls, c->fd))
        die("SSL_new failed");
    SSL_set_connect_state(c->tls);
}

static void end(struct connection *c)
{
    SSL_shutdown(c->tls); /* sends close_notify, and does not wait for the server's */
    ERR_clear_error();
    SSL_free(c->tls);
    close(c->fd); /* which takes it out of epoll, too */
}

/* Returns what read(2) or write(2) would, after a call of OpenSSL that moved no bytes. */
static ssize_t moved_nothing(struct connection *c)
{
    int error = SSL_get_error(c->tls, 0);
    bool cut = ERR_GET_REASON(ERR_peek_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING;
    ERR_clear_error(); /* otherwise the next call would report it */
    if (error == SSL_ERROR_ZERO_RETURN || cut)
        return 0;
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE)
        errno = EAGAIN;
    else if (error == SSL_ERROR_SSL)
        errno = EPROTO;
    return -1; /* with another error, errno is the socket's */
}

static ssize_t write_some(struct connection *c, const char *data, size_t size)
{
    size_t written;
    return SSL_write_ex(c->tls, data, size, &written) ? (ssize_t)written : moved_nothing(c);
}

static ssize_t read_some(struct connection *c, char *buffer, size_t size)
{
    size_t read;
    return SSL_read_ex(c->tls, buffer, size, &read) ? (ssize_t)read : moved_nothing(c);
}

/* 1 once the handshake is over; otherwise what read(2) would return. */
static ssize_t shake_hands(struct connection *c)
{
    return SSL_do_handshake(c->tls) == 1 ? 1 : moved_nothing(c);
}

#else

static void prepare(void) {}

static void begin(struct connection *c) { (void)c; }

static void end(struct connection *c)
{
    close(c->fd); /* which takes it out of epoll, too */
}

static ssize_t write_some(struct connection *c, const char *data, size_t size) { return write(c->fd, data, size); }

static ssize_t read_some(struct connection *c, char *buffer, size_t size) { return read(c->fd, buffer, size); }

static ssize_t shake_hands(struct connection *c)
{
    (void)c;
    return 1;
}

#endif

/* Connections use many source addresses in turn. A closed connection keeps its port for a second or more (TIME_WAIT):
 * with a connection for each request, all from one address, connect(2) would find about 14,000 ports a second, however
 * fast the server is. */
static void bind_next_address(int fd)
{
    static unsigned turn;
    struct sockaddr_in client = {
        .sin_family = AF_INET,
        .sin_addr.s_addr = htonl(0x7f000101 + turn++ % ADDRESSES), /* from 127.0.1.1 on */
    };
    const int on = 1;
    /* connect(2) then picks the port: any that is free for this pair of addresses. */
    die_unless(setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on) == 0, "setsockopt");
    die_unless(bind(fd, (struct sockaddr *)&client, sizeof client) == 0, "bind");
}

static void open_connection(struct connection *c)
{
    c->sent = c->received = 0;
    c->began = now();
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    die_unless(c->fd >= 0, "socket");
    const int on = 1;
    die_unless(setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0, "setsockopt");
    bind_next_address(c->fd);
    begin(c);
    /* An immediate failure means that our ports are used up, or that nothing listens: then no rate can be measured. */
    die_unless(connect(c->fd, (struct sockaddr *)&server, sizeof server) == 0 || errno == EINPROGRESS, "connect");
    /* Edge-triggered, a connection needs no epoll_ctl(2) when it changes from sending to receiving, but each turn must
     * continue until EAGAIN. In bulk that might never come, and other connections would starve; level-triggered, a turn
     * may end earlier. */
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | (kind == BULK ? 0 : EPOLLET), .data.ptr = c};
    die_unless(epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event) == 0, "epoll_ctl");
}

static void reopen(struct connection *c)
{
    end(c);
    open_connection(c);
}

static void fail(struct connection *c, int error)
{
    if (failures++ == 0)
        first_failure = error;
    reopen(c);
}

/* The next two return how many bytes the kernel moved, 0 if they would block, and -1 if the connection broke; then it
 * has been reopened. */

static ssize_t send_some(struct connection *c, const char *data, size_t size)
{
    ssize_t sent = write_some(c, data, size);
    if (sent < 0 && errno == EAGAIN)
        return 0;
    if (sent <= 0) {
        fail(c, sent < 0 ? errno : 0);
        return -1;
    }
    c->sent += sent;
    return sent;
}

static ssize_t receive_some(struct connection *c, const char *due, size_t size)
{
    static char buffer[BUFFER_SIZE];
    ssize_t received = read_some(c, buffer, sizeof buffer);
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

/* Returns whether the connection is ready for bytes: with TLS, whether the handshake is over. */
static bool ready(struct connection *c)
{
    ssize_t done = shake_hands(c);
    if (done <= 0 && !(done < 0 && errno == EAGAIN))
        fail(c, done < 0 ? errno : 0);
    return done > 0;
}

static void count_latency(double seconds)
{
    double microseconds = seconds * 1e6;
    if (warm)
        latencies[microseconds < LONGEST ? (size_t)microseconds : LONGEST]++;
}

/* Send the message and receive the reply, repeatedly, until that would block. */
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
        double ended = now();
        count_latency(ended - c->began);
        if (kind == OP) {
            reopen(c);
            return;
        }
        c->sent = c->received = 0;
        c->began = ended;
    }
}

/* Send and receive as much as possible in one turn. */
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

/* A message for an echo server, and for bulk its continuation: enough that from any position in the period, a call can
 * send a whole message, or compare a whole buffer. */
static void make_message(size_t size)
{
    message_size = expected_size = size;
    period = size + 1; /* not the size, to detect a lost or repeated message */
    size_t stored = period + size + BUFFER_SIZE;
    message = expected = allocate(stored);
    for (size_t i = 0; i < stored; i++) {
        size_t at = i % period;
        message[i] = (char)(at * 131 + at / 251); /* to detect a lost or moved byte */
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
    uint32_t sum = 0; /* wraps like the protocol's */
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

/* Returns the time at which it ended. */
static double run_until(double end)
{
    struct epoll_event events[MAX_EVENTS];
    double time;
    while ((time = now()) < end) {
        int count = epoll_wait(poller, events, MAX_EVENTS, 10 /* milliseconds */);
        for (int i = 0; i < count; i++) {
            struct connection *c = events[i].data.ptr;
            if (ready(c))
                (kind == BULK ? flood : converse)(c);
        }
    }
    return time;
}

/* In microseconds; negative if no latency was counted. */
static double percentile(double percent)
{
    uint64_t total = 0, below = 0;
    for (size_t i = 0; i <= LONGEST; i++)
        total += latencies[i];
    for (size_t i = 0; i <= LONGEST; i++) {
        below += latencies[i];
        if (below > 0 && below >= total * percent / 100)
            return i;
    }
    return -1;
}

static void print_percentile(const char *name, double percent)
{
    double latency = percentile(percent);
    if (latency < 0)
        printf("\"%s\": null, ", name);
    else
        printf("\"%s\": %.0f, ", name, latency);
}

static void read_arguments(int argc, char **argv, long *connections, long *size, double *seconds)
{
    static const char *const kinds[] = {[ECHO] = "echo", [OP] = "op", [PIPE] = "pipe", [BULK] = "bulk"};
    if (argc != 7)
        die("usage: load HOST PORT echo|op|pipe|bulk CONNECTIONS SIZE SECONDS");
    server.sin_family = AF_INET;
    if (inet_pton(AF_INET, argv[1], &server.sin_addr) != 1)
        die("HOST is not an IPv4 address");
    if (ntohl(server.sin_addr.s_addr) >> 24 != 127)
        die("HOST is not a loopback address");
    server.sin_port = htons((uint16_t)atoi(argv[2]));
    for (kind = ECHO; strcmp(argv[3], kinds[kind]) != 0; kind++)
        if (kind == BULK)
            die("the kind of load is not echo, op, pipe or bulk");
    *connections = atol(argv[4]);
    *size = atol(argv[5]);
    *seconds = atof(argv[6]);
    if (*connections < 1 || *size < 1 || !(*seconds > 0))
        die("CONNECTIONS, SIZE and SECONDS must be above 0");
    if ((kind == OP || kind == PIPE) && *size > 255)
        die("a request can have at most 255 operands");
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
    signal(SIGPIPE, SIG_IGN); /* a connection that the server has closed is counted as a failure instead */
    prepare();
    poller = epoll_create1(0);
    die_unless(poller >= 0, "epoll_create1");
    struct connection *all = allocate(connections * sizeof *all);
    for (long i = 0; i < connections; i++)
        open_connection(&all[i]);

    double began = run_until(now() + WARM_UP);
    uint64_t bytes_before = bytes_received;
    double computed_before = read_clock(CLOCK_PROCESS_CPUTIME_ID);
    warm = true;
    double ended = run_until(began + seconds);
    double busy = (read_clock(CLOCK_PROCESS_CPUTIME_ID) - computed_before) / (ended - began);

    double reply_size = kind == ECHO || kind == BULK ? size : 4;
    double rate = (bytes_received - bytes_before) / reply_size / (ended - began);
    const char *reason = !failures ? "" : first_failure ? strerror(first_failure) : "end of stream";
    if (bytes_received == bytes_before) {
        fprintf(stderr, "load: no reply; failed connections: %" PRIu64 " %s\n", failures, reason);
        return 1;
    }
    printf("{\"rate\": %.1f, ", rate);
    print_percentile("p50", 50);
    print_percentile("p99", 99);
    printf("\"busy\": %.3f, ", busy);
    printf("\"failures\": %" PRIu64 ", \"reason\": \"%s\"}\n", failures, reason);
    return 0;
}
