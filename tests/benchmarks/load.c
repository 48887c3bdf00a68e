/* What loads a tunnel and measures it: both ends of its streams, and a slow, lossy path to put it on.
 *
 *     load target --port P [--bind A]            listens; prints {"port": P}; ends when its stdin does
 *     load ready  --to A:P [--seconds S] [--get PATH]  tries until a stream through A:P works
 *     load bulk   --to A:P --direction up|down (--bytes N | --seconds S) [--verify]
 *     load echo   --to A:P [--count N]           one stream, one message of 64 bytes at a time
 *     load streams --to A:P --streams K --seconds S    K streams, one message of 64 bytes in flight on each
 *     load opens  --to A:P --seconds S [--at-once K] [--get PATH]   connect, echo (or HTTP request), close, again
 *     load first  --to A:P [--count K]           K connects at once: the time to the first echoed byte of each
 *     load hold   --to A:P --streams K           K idle streams, until its stdin ends; prints {} when they are up
 *     load beside --to A:P --direction up|down --seconds S   echo latency while a bulk stream runs
 *     load path   --name-a A --name-b B [--delay-ms D] [--loss PERCENT] [--mbit R] [--buffer-kb B] [--seed N]
 *                                                joins two network namespaces; `loss PERCENT` on stdin changes it
 *
 * Each prints JSON on stdout, a line a result; an error is one line on stderr and exit code 1.
 *
 * To be no bottleneck: what is sent comes from the page cache with sendfile(2), without a copy, and what is received is
 * dropped inside the kernel (MSG_TRUNC), unless it is to be verified. The bytes are random: nothing can compress them.
 *
 * A stream begins with 9 bytes from the driver: a mode and a 64-bit number, big endian. 'E' echoes what follows. 'S'
 * counts it, and answers with the count as 64 bits every 50 ms, and at once when it reaches the number. 'G' sends as
 * many bytes as the number says, 0 for no end. 's' and 'g' do the same with a pattern that the receiver verifies. No
 * mode needs half-close: not every tunnel carries it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    HEADER = 9,
    MESSAGE = 64,
    BUFFER = 256 << 10,
    SOURCE_BYTES = 4 << 20, /* of random bytes, sent over and over */
    PIECE = 1 << 20,        /* one sendfile: so that one bulk stream cannot hold up the target's others */
    EVENTS = 256,
    REPORT_MS = 50,
    STALL_SECONDS = 60, /* without a byte: the stream is broken, whatever the tunnel says */
};

static struct {
    const char *to, *bind, *get, *direction, *name_a, *name_b;
    int port, streams, at_once, verify;
    uint64_t bytes, count, seed;
    double seconds, interval_ms, delay_ms, loss, mbit, buffer_kb;
} option = {.bind = "127.0.0.1", .direction = "up", .at_once = 1, .seed = 1, .interval_ms = 10, .delay_ms = 40,
            .mbit = 1000, .buffer_kb = 4096};

static char buffer[BUFFER];

/* ---------------------------------------------------------------------------------------------- shared parts */

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
    int code = errno;
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, code ? ": %s\n" : "\n", strerror(code));
    _exit(1);
}

__attribute__((noreturn)) static void fail_plainly(const char *message)
{
    errno = 0;
    fail("%s", message);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (!memory)
        fail("out of memory");
    return memory;
}

/* A file in memory with random bytes. */
static int random_source(void)
{
    int fd = memfd_create("source", MFD_CLOEXEC);
    if (fd < 0)
        fail("memfd_create");
    for (int written = 0; written < SOURCE_BYTES; written += BUFFER) {
        for (int filled = 0; filled < BUFFER; filled += 256) /* 256 is what is never cut short */
            if (getrandom(buffer + filled, 256, 0) != 256)
                fail("getrandom");
        if (write(fd, buffer, BUFFER) != BUFFER)
            fail("memfd");
    }
    return fd;
}

/* The pattern's byte at an offset: a shift or a repeat of any length shows. */
static char pattern(uint64_t offset)
{
    return (char)((offset / 8 * 0x9E3779B97F4A7C15u) >> (offset % 8 * 8 ^ 8));
}

/* Send what the socket takes of at most `most` bytes of the source, or of the pattern, from `offset`. Like send(2). */
static ssize_t send_some(int fd, int source, uint64_t offset, uint64_t most, int verify)
{
    if (verify) {
        size_t size = most < BUFFER ? (size_t)most : BUFFER;
        for (size_t index = 0; index < size; index++)
            buffer[index] = pattern(offset + index);
        return send(fd, buffer, size, MSG_NOSIGNAL);
    }
    off_t place = (off_t)(offset % SOURCE_BYTES);
    uint64_t size = (uint64_t)(SOURCE_BYTES - place) < most ? (uint64_t)(SOURCE_BYTES - place) : most;
    return sendfile(fd, source, &place, size < PIECE ? (size_t)size : PIECE);
}

/* Receive and drop at most `most` bytes. Returns like recv(2). */
static ssize_t receive_some(int fd, uint64_t offset, uint64_t most, int verify)
{
    if (!verify)
        return recv(fd, NULL, most < (1 << 30) ? (size_t)most : 1 << 30, MSG_TRUNC);
    ssize_t count = recv(fd, buffer, most < BUFFER ? (size_t)most : BUFFER, 0);
    for (ssize_t index = 0; index < count; index++)
        if (buffer[index] != pattern(offset + (uint64_t)index))
            return -2;
    return count;
}

static struct sockaddr_in address_of(const char *text)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    char host[64] = "";
    const char *colon = strrchr(text, ':');
    if (colon && (size_t)(colon - text) < sizeof host)
        memcpy(host, text, (size_t)(colon - text));
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
        fail_plainly("--to: an IPv4 address and a port, as in 127.0.0.1:80");
    address.sin_port = htons((uint16_t)atoi(colon + 1));
    return address;
}

static int new_socket(int flags)
{
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (fd < 0)
        fail("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

/* A blocking connection, on which no call waits for longer than STALL_SECONDS. */
static int connected(void)
{
    struct sockaddr_in address = address_of(option.to);
    struct timeval stall = {.tv_sec = STALL_SECONDS};
    int fd = new_socket(0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &stall, sizeof stall);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &stall, sizeof stall);
    if (connect(fd, (struct sockaddr *)&address, sizeof address))
        fail("connect to %s", option.to);
    return fd;
}

/* The header, and for 'E' a first message behind it. Returns the size. */
static size_t beginning(char *into, char mode, uint64_t number)
{
    uint64_t order = htobe64(number);
    into[0] = mode;
    memcpy(into + 1, &order, sizeof order);
    memset(into + HEADER, '.', MESSAGE);
    return mode == 'E' ? HEADER + MESSAGE : HEADER;
}

static void send_all(int fd, const char *data, size_t size)
{
    if (send(fd, data, size, MSG_NOSIGNAL) != (ssize_t)size)
        fail("send");
}

/* Receive one whole message. Returns whether it came; fails unless `may_fail`. */
static int receive_message(int fd, int may_fail)
{
    char message[MESSAGE];
    ssize_t count = recv(fd, message, MESSAGE, MSG_WAITALL);
    if (count == MESSAGE)
        return 1;
    if (may_fail)
        return 0;
    if (count >= 0)
        fail_plainly("the stream ended before its echo was back");
    fail("the echo did not come");
}

static int send_beginning(int fd, char mode, uint64_t number)
{
    char data[HEADER + MESSAGE];
    size_t size = beginning(data, mode, number);
    return send(fd, data, size, MSG_NOSIGNAL) == (ssize_t)size;
}

static int ascending(const void *left, const void *right)
{
    double one = *(const double *)left, other = *(const double *)right;
    return (one > other) - (one < other);
}

static double percentile(const double *sorted, size_t count, double share)
{
    return sorted[(size_t)(share * (double)(count - 1) + 0.5)];
}

static void print_latencies(double *seconds, size_t count)
{
    qsort(seconds, count, sizeof *seconds, ascending);
    printf("{\"count\": %zu, \"p50_us\": %.2f, \"p95_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f", count,
           percentile(seconds, count, 0.5) * 1e6, percentile(seconds, count, 0.95) * 1e6,
           percentile(seconds, count, 0.99) * 1e6, seconds[count - 1] * 1e6);
}

static int new_epoll(void)
{
    int fd = epoll_create1(EPOLL_CLOEXEC);
    if (fd < 0)
        fail("epoll_create1");
    return fd;
}

static void watch(int epoll, int operation, int fd, uint32_t events, void *data)
{
    struct epoll_event event = {.events = events, .data.ptr = data};
    if (epoll_ctl(epoll, operation, fd, &event))
        fail("epoll_ctl");
}

/* ---------------------------------------------------------------------------------------------------- target */

struct connection {
    int fd, headed;
    char header[HEADER];
    uint64_t number, done, reported;
    char *rest; /* of an echo that the socket did not take, of `rest_size` bytes */
    size_t rest_size;
    struct connection *next_sink, *previous_sink;
};

static int target_epoll, target_source;
static struct connection sinks = {.next_sink = &sinks, .previous_sink = &sinks};

static void drop(struct connection *connection)
{
    if (connection->next_sink) {
        connection->next_sink->previous_sink = connection->previous_sink;
        connection->previous_sink->next_sink = connection->next_sink;
    }
    close(connection->fd);
    free(connection->rest);
    free(connection);
}

static int report(struct connection *sink)
{
    uint64_t order = htobe64(sink->done);
    sink->reported = sink->done;
    return send(sink->fd, &order, sizeof order, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof order;
}

static void report_all(void)
{
    for (struct connection *sink = sinks.next_sink, *next; sink != &sinks; sink = next) {
        next = sink->next_sink;
        if (sink->done != sink->reported && !report(sink))
            drop(sink);
    }
}

/* Each of these returns whether the connection goes on. */

static int sink_bytes(struct connection *sink)
{
    int wrong = sink->done == UINT64_MAX;
    ssize_t count = receive_some(sink->fd, sink->done, UINT64_MAX, sink->header[0] == 's' && !wrong);
    if (count == -2) {
        sink->done = UINT64_MAX; /* says so, and goes on reading: closing now would reset that away */
        return report(sink);
    }
    if (count <= 0)
        return count < 0 && errno == EAGAIN;
    if (wrong)
        return 1;
    sink->done += (uint64_t)count;
    return sink->number == 0 || sink->done < sink->number || report(sink);
}

static int source_bytes(struct connection *source)
{
    uint64_t most = source->number ? source->number - source->done : UINT64_MAX;
    ssize_t count = send_some(source->fd, target_source, source->done, most, source->header[0] == 'g');
    if (count < 0)
        return errno == EAGAIN;
    source->done += (uint64_t)count;
    if (source->number && source->done == source->number) /* the driver closes when it has them all */
        watch(target_epoll, EPOLL_CTL_MOD, source->fd, EPOLLIN, source);
    return 1;
}

static int echo_bytes(struct connection *echo, const char *data, size_t size)
{
    ssize_t sent = size ? send(echo->fd, data, size, MSG_NOSIGNAL) : 0;
    if (sent < 0 && errno != EAGAIN)
        return 0;
    sent = sent < 0 ? 0 : sent;
    if ((size_t)sent == size)
        return 1;
    echo->rest_size = size - (size_t)sent;
    echo->rest = allocate(1, echo->rest_size);
    memcpy(echo->rest, data + sent, echo->rest_size);
    watch(target_epoll, EPOLL_CTL_MOD, echo->fd, EPOLLOUT, echo);
    return 1;
}

static int echo_rest(struct connection *echo)
{
    char *rest = echo->rest;
    size_t size = echo->rest_size;
    echo->rest = NULL;
    int goes_on = echo_bytes(echo, rest, size);
    free(rest);
    if (goes_on && !echo->rest)
        watch(target_epoll, EPOLL_CTL_MOD, echo->fd, EPOLLIN, echo);
    return goes_on;
}

static int begin(struct connection *connection, const char *data, size_t size)
{
    size_t missing = (size_t)(HEADER - connection->headed), taken = size < missing ? size : missing;
    memcpy(connection->header + connection->headed, data, taken);
    connection->headed += (int)taken;
    if (connection->headed < HEADER)
        return 1;
    memcpy(&connection->number, connection->header + 1, sizeof connection->number);
    connection->number = be64toh(connection->number);
    switch (connection->header[0]) {
    case 'E':
        return echo_bytes(connection, data + taken, size - taken);
    case 'S':
    case 's':
        connection->next_sink = sinks.next_sink;
        connection->previous_sink = &sinks;
        sinks.next_sink->previous_sink = connection;
        sinks.next_sink = connection;
        return 1;
    case 'G':
    case 'g':
        watch(target_epoll, EPOLL_CTL_MOD, connection->fd, EPOLLOUT, connection);
        return 1;
    }
    return 0;
}

static int serve(struct connection *connection)
{
    if (connection->headed == HEADER) {
        switch (connection->header[0]) {
        case 'S':
        case 's':
            return sink_bytes(connection);
        case 'G':
        case 'g':
            if (!connection->number || connection->done < connection->number)
                return source_bytes(connection);
            return recv(connection->fd, buffer, BUFFER, 0) > 0;
        }
        if (connection->rest)
            return echo_rest(connection);
    }
    /* Only an echo's beginning may be read with its header: what a sink gets is counted from its first byte. */
    size_t most = connection->headed < 1 ? 1 : BUFFER;
    if (connection->headed < HEADER && connection->header[0] != 'E' && connection->headed)
        most = (size_t)(HEADER - connection->headed);
    ssize_t count = recv(connection->fd, buffer, most, connection->headed < 1 ? MSG_PEEK : 0);
    if (count <= 0)
        return count < 0 && errno == EAGAIN;
    if (connection->headed < 1) {
        most = buffer[0] == 'E' ? BUFFER : HEADER;
        if ((count = recv(connection->fd, buffer, most, 0)) <= 0)
            return 0;
    }
    if (connection->headed < HEADER)
        return begin(connection, buffer, (size_t)count);
    return echo_bytes(connection, buffer, (size_t)count);
}

static void accept_some(int listener)
{
    for (int turn = 0; turn < 64; turn++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0)
            return;
        struct connection *connection = allocate(1, sizeof *connection);
        connection->fd = fd;
        watch(target_epoll, EPOLL_CTL_ADD, fd, EPOLLIN, connection);
    }
}

static void run_target(void)
{
    int one = 1, listener = new_socket(SOCK_NONBLOCK); /* what is accepted inherits TCP_NODELAY */
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)option.port)};
    socklen_t size = sizeof address;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (inet_pton(AF_INET, option.bind, &address.sin_addr) != 1 ||
        bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096) ||
        getsockname(listener, (struct sockaddr *)&address, &size))
        fail("listen on %s", option.bind);
    target_epoll = new_epoll();
    target_source = random_source();
    watch(target_epoll, EPOLL_CTL_ADD, listener, EPOLLIN, &address);
    watch(target_epoll, EPOLL_CTL_ADD, STDIN_FILENO, EPOLLIN, &option);
    printf("{\"port\": %d}\n", ntohs(address.sin_port));
    fflush(stdout);
    for (double due = now();;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(target_epoll, events, EVENTS, sinks.next_sink == &sinks ? -1 : REPORT_MS);
        for (int index = 0; index < ready; index++) {
            void *owner = events[index].data.ptr;
            if (owner == &address)
                accept_some(listener);
            else if (owner == &option)
                return; /* whoever started it has ended */
            else if (!serve(owner))
                drop(owner);
        }
        if (sinks.next_sink != &sinks && now() >= due) {
            report_all();
            due = now() + REPORT_MS / 1e3;
        }
    }
}

/* ---------------------------------------------------------------------------------------------------- driver */

/* Bulk to the target: `bytes` of them, or for as long as `seconds`. Goes by what the target says that it has. */
static void bulk_up(uint64_t bytes, double seconds, volatile uint64_t *progress)
{
    int source = random_source(), fd = connected();
    uint64_t sent = 0, arrived = 0;
    char answer[8];
    size_t answered = 0;
    double begun = now(), last = begun;
    if (!send_beginning(fd, option.verify ? 's' : 'S', bytes))
        fail("send");
    fcntl(fd, F_SETFL, O_NONBLOCK);
    while (bytes ? arrived < bytes : now() - begun < seconds) {
        struct pollfd poller = {.fd = fd, .events = (short)(!bytes || sent < bytes ? POLLIN | POLLOUT : POLLIN)};
        if (poll(&poller, 1, 100) < 0)
            fail("poll");
        if (now() - last > STALL_SECONDS)
            fail_plainly("bulk up: stalled");
        if (poller.revents & (POLLIN | POLLHUP | POLLERR)) {
            ssize_t count = recv(fd, answer + answered, sizeof answer - answered, 0);
            if (count == 0)
                fail_plainly("bulk up: the stream ended early");
            if (count < 0 && errno != EAGAIN)
                fail("bulk up");
            answered += count > 0 ? (size_t)count : 0;
            if (answered == sizeof answer) {
                answered = 0;
                memcpy(&arrived, answer, sizeof arrived);
                arrived = be64toh(arrived);
                if (arrived == UINT64_MAX)
                    fail_plainly("bulk up: what arrived is not what was sent");
                last = now();
                if (progress)
                    *progress = arrived;
            }
        }
        if (poller.revents & POLLOUT) {
            ssize_t count = send_some(fd, source, sent, bytes ? bytes - sent : UINT64_MAX, option.verify);
            if (count < 0 && errno != EAGAIN)
                fail("bulk up");
            sent += count > 0 ? (uint64_t)count : 0;
        }
    }
    /* A report is at most one interval and the path's delay old; an older one means that nothing arrived since. */
    double end = bytes || now() - last < 0.25 ? last : now();
    printf("{\"bytes\": %llu, \"seconds\": %.6f}\n", (unsigned long long)arrived, end - begun);
    close(fd);
}

static void bulk_down(uint64_t bytes, double seconds, volatile uint64_t *progress)
{
    int fd = connected();
    uint64_t arrived = 0;
    double begun = now();
    struct timeval tick = {.tv_usec = 100000}, stall = {.tv_sec = STALL_SECONDS};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, bytes ? &stall : &tick, sizeof tick);
    if (!send_beginning(fd, option.verify ? 'g' : 'G', bytes))
        fail("send");
    while (bytes ? arrived < bytes : now() - begun < seconds) {
        ssize_t count = receive_some(fd, arrived, bytes ? bytes - arrived : UINT64_MAX, option.verify);
        if (count == -2)
            fail_plainly("bulk down: what arrived is not what was sent");
        if (count == 0)
            fail_plainly("bulk down: the stream ended early");
        if (count < 0 && (bytes || errno != EAGAIN))
            fail("bulk down");
        arrived += count > 0 ? (uint64_t)count : 0;
        if (progress)
            *progress = arrived;
    }
    printf("{\"bytes\": %llu, \"seconds\": %.6f}\n", (unsigned long long)arrived, now() - begun);
    close(fd);
}

static void bulk(uint64_t bytes, double seconds, volatile uint64_t *progress)
{
    if (strcmp(option.direction, "down") == 0)
        bulk_down(bytes, seconds, progress);
    else
        bulk_up(bytes, seconds, progress);
}

static void run_bulk(void)
{
    if (!option.bytes && option.seconds <= 0)
        fail_plainly("bulk: --bytes or --seconds");
    bulk(option.bytes, option.seconds, NULL);
}

static void run_echo(void)
{
    size_t count = option.count ? option.count : 10000, warm = count / 10;
    double *taken = allocate(count, sizeof *taken);
    char message[MESSAGE] = "";
    int fd = connected();
    if (!send_beginning(fd, 'E', 0))
        fail("send");
    receive_message(fd, 0);
    for (size_t turn = 0; turn < warm + count; turn++) {
        double begun = now();
        send_all(fd, message, MESSAGE);
        receive_message(fd, 0);
        if (turn >= warm)
            taken[turn - warm] = now() - begun;
    }
    print_latencies(taken, count);
    printf("}\n");
}

struct slot {
    int fd;
    size_t received;
    double begun;
};

/* Connect without waiting, and say when the socket is writable or readable. */
static void open_slot(struct slot *slot, int epoll, const struct sockaddr_in *address)
{
    slot->begun = now();
    slot->received = 0;
    slot->fd = new_socket(SOCK_NONBLOCK);
    if (connect(slot->fd, (const struct sockaddr *)address, sizeof *address) && errno != EINPROGRESS)
        fail("connect to %s", option.to);
    watch(epoll, EPOLL_CTL_ADD, slot->fd, EPOLLOUT, slot);
}

/* What is sent on a new connection: a request, or an echo's beginning. Returns the size. */
static size_t first_bytes(char *into, size_t room)
{
    if (!option.get)
        return beginning(into, 'E', 0);
    return (size_t)snprintf(into, room, "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", option.get);
}

/* Whether this recv was the end of the exchange. */
static int exchange_done(struct slot *slot, const char *data, ssize_t count)
{
    if (count < 0 && errno == EAGAIN)
        return 0;
    if (count < 0)
        fail("a new stream");
    if (option.get) {
        if (slot->received == 0 && (count < 12 || memcmp(data, "HTTP/1.1 200", 12)))
            fail_plainly("the answer is not HTTP 200");
        slot->received += (size_t)count;
        return count == 0;
    }
    if (count == 0)
        fail_plainly("a new stream ended before its echo was back");
    slot->received += (size_t)count;
    return slot->received >= MESSAGE;
}

/* Serve the slots until `done(slot)` says that all is done. Closing and opening again is up to it. */
static void run_slots(int epoll, int (*done)(struct slot *))
{
    char first[512];
    size_t size = first_bytes(first, sizeof first);
    for (double last = now();;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(epoll, events, EVENTS, 1000);
        if (ready > 0)
            last = now();
        else if (now() - last > STALL_SECONDS)
            fail_plainly("stalled");
        for (int index = 0; index < ready; index++) {
            struct slot *slot = events[index].data.ptr;
            if (events[index].events & EPOLLOUT) {
                send_all(slot->fd, first, size);
                watch(epoll, EPOLL_CTL_MOD, slot->fd, EPOLLIN, slot);
            } else if (exchange_done(slot, buffer, recv(slot->fd, buffer, BUFFER, 0)) && done(slot)) {
                return;
            }
        }
    }
}

static struct {
    int epoll;
    struct sockaddr_in address;
    uint64_t count, running;
    double deadline, *taken;
    struct slot *end;
} opens;

static int opened_again(struct slot *slot)
{
    opens.count++;
    close(slot->fd);
    if (now() < opens.deadline)
        open_slot(slot, opens.epoll, &opens.address);
    else
        opens.running--;
    return opens.running == 0;
}

/* One at a time needs no epoll, and so fewer system calls. */
static void open_in_turn(void)
{
    char first[512];
    size_t size = first_bytes(first, sizeof first);
    while (now() < opens.deadline) {
        struct slot slot = {.fd = connected()};
        send_all(slot.fd, first, size);
        ssize_t got;
        do {
            if ((got = recv(slot.fd, buffer, BUFFER, 0)) < 0)
                fail("a new stream");
        } while (!exchange_done(&slot, buffer, got));
        close(slot.fd);
        opens.count++;
    }
}

static void run_opens(void)
{
    double begun = now();
    opens.deadline = begun + option.seconds;
    if (option.at_once == 1) {
        open_in_turn();
    } else {
        struct slot *slots = allocate((size_t)option.at_once, sizeof *slots);
        opens.epoll = new_epoll();
        opens.address = address_of(option.to);
        opens.running = (uint64_t)option.at_once;
        for (int index = 0; index < option.at_once; index++)
            open_slot(&slots[index], opens.epoll, &opens.address);
        run_slots(opens.epoll, opened_again);
    }
    printf("{\"opens\": %llu, \"seconds\": %.6f}\n", (unsigned long long)opens.count, now() - begun);
}

static int opened_first(struct slot *slot)
{
    opens.taken[opens.count++] = now() - slot->begun;
    close(slot->fd);
    return --opens.running == 0;
}

static void run_first(void)
{
    size_t count = option.count ? option.count : 1;
    struct slot *slots = allocate(count, sizeof *slots);
    opens.taken = allocate(count, sizeof *opens.taken);
    opens.epoll = new_epoll();
    opens.address = address_of(option.to);
    opens.running = count;
    for (size_t index = 0; index < count; index++)
        open_slot(&slots[index], opens.epoll, &opens.address);
    run_slots(opens.epoll, opened_first);
    print_latencies(opens.taken, count);
    printf("}\n");
}

static void run_streams(void)
{
    int epoll = new_epoll(), ready;
    char message[MESSAGE] = "";
    uint64_t count = 0;
    struct slot *slots = allocate((size_t)option.streams, sizeof *slots);
    for (int index = 0; index < option.streams; index++) {
        slots[index].fd = connected();
        if (!send_beginning(slots[index].fd, 'E', 0))
            fail("send");
        watch(epoll, EPOLL_CTL_ADD, slots[index].fd, EPOLLIN, &slots[index]);
    }
    double warm = now() + option.seconds / 10, begun = 0;
    for (;;) {
        struct epoll_event events[EVENTS];
        if ((ready = epoll_wait(epoll, events, EVENTS, STALL_SECONDS * 1000)) <= 0)
            fail_plainly("streams: stalled");
        for (int index = 0; index < ready; index++) {
            struct slot *slot = events[index].data.ptr;
            ssize_t got = recv(slot->fd, buffer, MESSAGE - slot->received, 0);
            if (got <= 0)
                fail_plainly("streams: a stream ended");
            slot->received += (size_t)got;
            if (slot->received < MESSAGE)
                continue;
            slot->received = 0;
            count++;
            send_all(slot->fd, message, MESSAGE);
        }
        double time = now();
        if (!begun && time >= warm) {
            begun = time;
            count = 0;
        } else if (begun && time - begun >= option.seconds) {
            printf("{\"messages\": %llu, \"seconds\": %.6f}\n", (unsigned long long)count, time - begun);
            return;
        }
    }
}

static int held(struct slot *slot)
{
    /* Each that is up opens the one 64 places on: 64 at a time, however many in all. */
    epoll_ctl(opens.epoll, EPOLL_CTL_DEL, slot->fd, NULL);
    if (++opens.count == (uint64_t)option.streams)
        return 1;
    if (slot + 64 < opens.end)
        open_slot(slot + 64, opens.epoll, &opens.address);
    return 0;
}

static void run_hold(void)
{
    double begun = now();
    int lost = 0, at_once = option.streams < 64 ? option.streams : 64;
    struct slot *slots = allocate((size_t)option.streams, sizeof *slots);
    opens.epoll = new_epoll();
    opens.address = address_of(option.to);
    opens.end = slots + option.streams;
    for (int index = 0; index < at_once; index++)
        open_slot(&slots[index], opens.epoll, &opens.address);
    run_slots(opens.epoll, held);
    printf("{\"streams\": %d, \"seconds\": %.6f}\n", option.streams, now() - begun);
    fflush(stdout);
    while (read(STDIN_FILENO, buffer, BUFFER) > 0) {
    }
    for (int index = 0; index < option.streams; index++)
        if (recv(slots[index].fd, buffer, 1, MSG_DONTWAIT) >= 0 || errno != EAGAIN)
            lost++;
    printf("{\"lost\": %d}\n", lost);
}

/* A message every few milliseconds, each with the time when it was sent: what waits shows, however few come back. */
static size_t echo_on_a_beat(double *taken, size_t count)
{
    char data[MESSAGE] = "", in[MESSAGE];
    size_t received = 0, sent = 0, back = 0;
    int fd = connected();
    if (!send_beginning(fd, 'E', 0))
        fail("send");
    receive_message(fd, 0);
    double begun = now(), interval = option.interval_ms / 1e3, end = begun + interval * (double)count;
    fcntl(fd, F_SETFL, O_NONBLOCK);
    while (back < count && now() < end + STALL_SECONDS) {
        double next = begun + interval * (double)sent;
        if (sent < count && now() >= next) {
            memcpy(data, &next, sizeof next); /* when it was due, not when this program got round to it */
            send_all(fd, data, MESSAGE);
            sent++;
            continue;
        }
        int wait = sent < count ? (int)((next - now()) * 1e3) : 1000;
        struct pollfd poller = {.fd = fd, .events = POLLIN};
        poll(&poller, 1, wait < 0 ? 0 : wait);
        ssize_t got = recv(fd, in + received, MESSAGE - received, 0);
        if (got == 0)
            fail_plainly("beside: the stream ended");
        received += got > 0 ? (size_t)got : 0;
        if (received == MESSAGE) {
            received = 0;
            memcpy(&next, in, sizeof next);
            taken[back++] = now() - next;
        }
    }
    if (back < count)
        fail_plainly("beside: stalled");
    return back;
}

static void run_beside(void)
{
    volatile uint64_t *progress = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    size_t count = (size_t)(option.seconds * 1e3 / option.interval_ms);
    double *taken = allocate(count, sizeof *taken);
    if (progress == MAP_FAILED)
        fail("mmap");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        freopen("/dev/null", "w", stdout);
        bulk(0, 1e9, progress);
        _exit(0);
    }
    usleep((useconds_t)((option.seconds < 2 ? option.seconds : 2) * 1e6)); /* until the bulk stream is up to speed */
    uint64_t before = *progress;
    double begun = now();
    echo_on_a_beat(taken, count);
    double bulk_rate = (double)(*progress - before) / (now() - begun);
    if (waitpid(child, NULL, WNOHANG) != 0)
        fail_plainly("beside: the bulk stream ended");
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    print_latencies(taken, count);
    printf(", \"bulk_bytes_per_second\": %.0f}\n", bulk_rate);
}

static void run_ready(void)
{
    struct sockaddr_in address = address_of(option.to);
    char first[512];
    size_t size = first_bytes(first, sizeof first);
    double begun = now(), deadline = begun + (option.seconds > 0 ? option.seconds : 20);
    while (now() < deadline) {
        int fd = new_socket(0), works = 0;
        int left = (int)((deadline - now()) * 1e3) + 1, most = left < 2000 ? left : 2000;
        struct timeval patience = {.tv_sec = most / 1000, .tv_usec = most % 1000 * 1000};
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience); /* connect obeys it too */
        if (!connect(fd, (struct sockaddr *)&address, sizeof address) &&
            send(fd, first, size, MSG_NOSIGNAL) == (ssize_t)size)
            works = option.get ? recv(fd, buffer, 4, MSG_WAITALL) == 4 : receive_message(fd, 1);
        close(fd);
        if (works) {
            printf("{\"seconds\": %.6f}\n", now() - begun);
            return;
        }
        usleep(50000);
    }
    fail_plainly("no stream worked in time");
}

/* ------------------------------------------------------------------------------------------------------ path */

/* One direction: a link of `mbit` with a drop-tail buffer before it, and a delay behind it. Nothing is reordered. */
enum { SLOTS = 32768, PACKET = 1600 };

struct direction {
    int from, to;
    double *due;
    uint16_t *size;
    char *packets;
    uint64_t head, tail, random, carried, lost, overrun;
    double free_at; /* when the link has sent all that it took */
};

static double dice(struct direction *direction) /* splitmix64: the same losses for the same seed */
{
    uint64_t mixed = direction->random += 0x9E3779B97F4A7C15u;
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9u;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
    return (double)((mixed ^ mixed >> 31) >> 11) / 9007199254740992.0;
}

static void open_direction(struct direction *direction, int from, int to, uint64_t seed)
{
    *direction = (struct direction){.from = from, .to = to, .random = seed};
    direction->due = allocate(SLOTS, sizeof *direction->due);
    direction->size = allocate(SLOTS, sizeof *direction->size);
    direction->packets = allocate(SLOTS, PACKET);
}

static int open_device(const char *name)
{
    char place[128];
    int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    snprintf(place, sizeof place, "/run/netns/%s", name);
    int there = open(place, O_RDONLY | O_CLOEXEC);
    if (home < 0 || there < 0 || setns(there, CLONE_NEWNET))
        fail("the network namespace %s", name);
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    strcpy(request.ifr_name, "wide");
    if (device < 0 || ioctl(device, TUNSETIFF, &request))
        fail("a TUN device");
    if (setns(home, CLONE_NEWNET))
        fail("the way back");
    close(home);
    close(there);
    return device;
}

static void take_packets(struct direction *direction)
{
    for (int turn = 0; turn < 128; turn++) {
        uint64_t slot = direction->tail % SLOTS;
        char *packet = direction->packets + slot * PACKET;
        ssize_t size = read(direction->from, packet, PACKET);
        if (size <= 0)
            return;
        double time = now(), starts = direction->free_at > time ? direction->free_at : time;
        double per_byte = 8 / (option.mbit * 1e6);
        if (option.loss > 0 && dice(direction) < option.loss / 100) {
            direction->lost++;
        } else if ((starts - time) / per_byte > option.buffer_kb * 1024 ||
                   direction->tail - direction->head == SLOTS - 1) {
            direction->overrun++;
        } else {
            direction->free_at = starts + (double)size * per_byte;
            direction->due[slot] = direction->free_at + option.delay_ms / 1e3;
            direction->size[slot] = (uint16_t)size;
            direction->tail++;
        }
    }
}

/* Deliver what is due. Returns when the next one is, or infinity. */
static double deliver(struct direction *direction)
{
    while (direction->head != direction->tail) {
        uint64_t slot = direction->head % SLOTS;
        if (direction->due[slot] > now())
            return direction->due[slot];
        if (write(direction->to, direction->packets + slot * PACKET, direction->size[slot]) < 0 && errno == EAGAIN)
            return now() + 1e-4;
        direction->head++;
        direction->carried++;
    }
    return 1e300;
}

static void print_path(const struct direction *ways)
{
    printf("{");
    for (int way = 0; way < 2; way++)
        printf("%s: {\"carried\": %llu, \"lost\": %llu, \"overrun\": %llu}", way ? ", \"back\"" : "\"there\"",
               (unsigned long long)ways[way].carried, (unsigned long long)ways[way].lost,
               (unsigned long long)ways[way].overrun);
    printf("}\n");
    fflush(stdout);
}

static void run_path(void)
{
    struct direction ways[2];
    int left = open_device(option.name_a), right = open_device(option.name_b);
    open_direction(&ways[0], left, right, option.seed);
    open_direction(&ways[1], right, left, ~option.seed);
    setpriority(PRIO_PROCESS, 0, -20); /* a path does not wait for its users' CPU time */
    prctl(PR_SET_TIMERSLACK, 1000UL);
    printf("{}\n");
    fflush(stdout);
    for (double next = 1e300;;) {
        struct pollfd pollers[3] = {{.fd = left, .events = POLLIN}, {.fd = right, .events = POLLIN},
                                    {.fd = STDIN_FILENO, .events = POLLIN}};
        double wait = next - now();
        wait = wait < 0 ? 0 : wait > 1 ? 1 : wait;
        struct timespec timeout = {.tv_sec = (time_t)wait, .tv_nsec = (long)((wait - (double)(time_t)wait) * 1e9)};
        ppoll(pollers, 3, &timeout, NULL);
        take_packets(&ways[0]);
        take_packets(&ways[1]);
        double there = deliver(&ways[0]), back = deliver(&ways[1]);
        next = there < back ? there : back;
        if (pollers[2].revents) {
            ssize_t count = read(STDIN_FILENO, buffer, BUFFER - 1);
            buffer[count > 0 ? count : 0] = 0;
            if (count <= 0)
                return;
            if (sscanf(buffer, "loss %lf", &option.loss) != 1)
                fail_plainly("path: only `loss PERCENT` is understood");
            print_path(ways);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------ main */

static void read_options(int count, char **arguments)
{
    static const struct option known[] = {
        {"to", 1, 0, 't'},       {"bind", 1, 0, 'b'},     {"get", 1, 0, 'g'},        {"direction", 1, 0, 'd'},
        {"port", 1, 0, 'p'},     {"streams", 1, 0, 'k'},  {"at-once", 1, 0, 'a'},    {"verify", 0, 0, 'v'},
        {"bytes", 1, 0, 'n'},    {"count", 1, 0, 'c'},    {"seed", 1, 0, 'x'},       {"seconds", 1, 0, 's'},
        {"interval-ms", 1, 0, 'i'}, {"delay-ms", 1, 0, 'D'}, {"loss", 1, 0, 'l'},    {"mbit", 1, 0, 'm'},
        {"buffer-kb", 1, 0, 'B'}, {"name-a", 1, 0, '1'}, {"name-b", 1, 0, '2'},      {0, 0, 0, 0},
    };
    for (int letter; (letter = getopt_long(count, arguments, "", known, NULL)) != -1;) {
        switch (letter) {
        case 't': option.to = optarg; break;
        case 'b': option.bind = optarg; break;
        case 'g': option.get = optarg; break;
        case 'd': option.direction = optarg; break;
        case 'p': option.port = atoi(optarg); break;
        case 'k': option.streams = atoi(optarg); break;
        case 'a': option.at_once = atoi(optarg); break;
        case 'v': option.verify = 1; break;
        case 'n': option.bytes = strtoull(optarg, NULL, 10); break;
        case 'c': option.count = strtoull(optarg, NULL, 10); break;
        case 'x': option.seed = strtoull(optarg, NULL, 10); break;
        case 's': option.seconds = atof(optarg); break;
        case 'i': option.interval_ms = atof(optarg); break;
        case 'D': option.delay_ms = atof(optarg); break;
        case 'l': option.loss = atof(optarg); break;
        case 'm': option.mbit = atof(optarg); break;
        case 'B': option.buffer_kb = atof(optarg); break;
        case '1': option.name_a = optarg; break;
        case '2': option.name_b = optarg; break;
        default: exit(2);
        }
    }
}

int main(int count, char **arguments)
{
    static const struct {
        const char *name;
        void (*run)(void);
        int needs_address;
    } commands[] = {{"target", run_target, 0}, {"ready", run_ready, 1},     {"bulk", run_bulk, 1},
                    {"echo", run_echo, 1},     {"streams", run_streams, 1}, {"opens", run_opens, 1},
                    {"first", run_first, 1},   {"hold", run_hold, 1},       {"beside", run_beside, 1},
                    {"path", run_path, 0}};
    struct rlimit descriptors;
    if (count < 2)
        fail_plainly("a command: see the top of load.c");
    read_options(count - 1, arguments + 1);
    getrlimit(RLIMIT_NOFILE, &descriptors);
    descriptors.rlim_cur = descriptors.rlim_max;
    setrlimit(RLIMIT_NOFILE, &descriptors);
    signal(SIGPIPE, SIG_IGN);
    for (size_t index = 0; index < sizeof commands / sizeof *commands; index++) {
        if (strcmp(commands[index].name, arguments[1]) != 0)
            continue;
        if (commands[index].needs_address && !option.to)
            fail_plainly("--to is missing");
        commands[index].run();
        return 0;
    }
    fail_plainly("no such command: see the top of load.c");
}
