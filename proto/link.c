/* link.c - the one file that knows CZMQ and libzmq.
 *
 * Each option below is here because its default lost messages or killed the process:
 *   ROUTER_MANDATORY  without it a send to a peer that is gone or full says "sent" and drops the message
 *   MAXMSGSIZE        unlimited by default: a peer could make us allocate anything
 *   LINGER            CZMQ sets 0 at destroy: a goodbye would be thrown away; we say how long, at close
 *   HEARTBEAT_IVL     stays 0: libzmq 4.3.4 aborts the process with it (stream_engine_base, _input_stopped)
 *   ROUTER_HANDOVER   stays off: it cuts the old connection together with its unread messages
 *   TCP_KEEPALIVE     a half-open connection is noticed although nobody sends
 * CZMQ installs signal handlers of its own unless told not to before its first call, and aborts when two threads make that
 * call at once (zsys_init lets go of its lock before its last settings): czmq_start is done once. An ipc:// endpoint is taken
 * over silently by a second bind (libzmq unlinks the file), so we ask first whether somebody answers there. */
#include "link.h"

#include <assert.h>
#include <czmq.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#define QUEUE_MESSAGES 1000 /* per peer and direction; credit keeps real use far below */
#define EXTRA_MAX 8
#define FRAMES_MAX 3        /* peer, head, body */
#define KEEPALIVE_IDLE_S 20
#define KEEPALIVE_INTERVAL_S 5
#define KEEPALIVE_COUNT 3
#define BIND_TRIES 5
#define BIND_PAUSE_MS 50
#define RECONNECT_MS 100
#define RECONNECT_MAX_MS 2000

#ifdef __SANITIZE_THREAD__
/* libzmq hands messages between threads without locks, in ways ThreadSanitizer cannot see in a library it did not compile. */
const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
    return "called_from_lib:libzmq.so\nrace:libzmq.so\n";
}
#endif

struct link {
    zsock_t *socket;
    void *handle; /* the libzmq socket behind it */
    bool is_router;
    char endpoint[512];
};

/* --- endpoints ------------------------------------------------------------------------------------- */

static bool has_prefix(const char *text, const char *prefix)
{
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

static bool endpoint_ok(const char *endpoint, char *why, size_t why_bytes)
{
    bool is_loopback = has_prefix(endpoint, "tcp://127.0.0.1:") || has_prefix(endpoint, "tcp://[::1]:");
    bool is_file = has_prefix(endpoint, "ipc://") && endpoint[6] && endpoint[6] != '@' && endpoint[6] != '*';
    if (is_loopback || is_file)
        return true;
    snprintf(why, why_bytes,
             "endpoint '%s': only this machine may be named (tcp://127.0.0.1:PORT, tcp://[::1]:PORT, ipc:///PATH), "
             "because connections carry no keys",
             endpoint);
    return false;
}

/* Somebody who accepts connections at this file owns it; a file nobody answers at was left by a killed process. */
static bool file_answers(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return false; /* bind will say so */
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return false;
    bool taken = connect(fd, (struct sockaddr *)&address, sizeof address) == 0;
    close(fd);
    return taken;
}

static bool file_is_taken(const char *path)
{
    for (int tries = 1; file_answers(path); tries++) {
        if (tries == BIND_TRIES)
            return true;
        zclock_sleep(BIND_PAUSE_MS);
    }
    return false;
}

/* --- open and close ---------------------------------------------------------------------------------- */

static void czmq_start(void)
{
    setenv("ZSYS_SIGHANDLER", "false", 1); /* signals belong to the program */
    zsys_handler_set(NULL);
    zsys_init();
}

static struct link *link_new(int type, char *why, size_t why_bytes)
{
    static pthread_once_t started = PTHREAD_ONCE_INIT;
    pthread_once(&started, czmq_start);
    struct link *l = calloc(1, sizeof *l);
    if (l)
        l->socket = zsock_new(type);
    if (!l || !l->socket) {
        snprintf(why, why_bytes, "cannot make a socket: %s", zmq_strerror(errno));
        free(l);
        return NULL;
    }
    l->handle = zsock_resolve(l->socket);
    l->is_router = type == ZMQ_ROUTER;
    zsock_set_maxmsgsize(l->socket, MSG_BYTES_MAX);
    zsock_set_sndhwm(l->socket, QUEUE_MESSAGES);
    zsock_set_rcvhwm(l->socket, QUEUE_MESSAGES);
    zsock_set_linger(l->socket, 0);
    zsock_set_ipv6(l->socket, 1);
    zsock_set_tcp_keepalive(l->socket, 1);
    zsock_set_tcp_keepalive_idle(l->socket, KEEPALIVE_IDLE_S);
    zsock_set_tcp_keepalive_intvl(l->socket, KEEPALIVE_INTERVAL_S);
    zsock_set_tcp_keepalive_cnt(l->socket, KEEPALIVE_COUNT);
    if (l->is_router)
        zsock_set_router_mandatory(l->socket, 1);
    return l;
}

/* A link closed by this process lets go of its endpoint a moment later, in libzmq's own thread. 0 or an errno. */
static int bind_patiently(struct link *l, const char *endpoint)
{
    for (int tries = 1;; tries++) {
        if (zsock_bind(l->socket, "%s", endpoint) >= 0)
            return 0;
        if (zmq_errno() != EADDRINUSE || tries == BIND_TRIES)
            return zmq_errno();
        zclock_sleep(BIND_PAUSE_MS);
    }
}

bool link_bind(struct link **ret, const char *endpoint, char *why, size_t why_bytes)
{
    if (!endpoint_ok(endpoint, why, why_bytes))
        return false;
    if (has_prefix(endpoint, "ipc://") && file_is_taken(endpoint + 6)) {
        snprintf(why, why_bytes, "cannot bind %s: another process answers there; stop it or choose another name", endpoint);
        return false;
    }
    struct link *l = link_new(ZMQ_ROUTER, why, why_bytes);
    if (!l)
        return false;
    int error = bind_patiently(l, endpoint);
    if (error) {
        snprintf(why, why_bytes, "cannot bind %s: %s%s", endpoint, zmq_strerror(error),
                 error == EADDRINUSE ? "; stop the process that has it or choose another port (:* takes a free one)" : "");
        link_close(&l, 0);
        return false;
    }
    const char *bound = zsock_endpoint(l->socket);
    snprintf(l->endpoint, sizeof l->endpoint, "%s", bound ? bound : endpoint);
    *ret = l;
    return true;
}

bool link_connect(struct link **ret, const char *endpoint, const char *identity, char *why, size_t why_bytes)
{
    static atomic_uint socket_count;
    char peer[LINK_PEER_MAX];
    if (!endpoint_ok(endpoint, why, why_bytes))
        return false;
    unsigned number = atomic_fetch_add(&socket_count, 1) + 1;
    if ((size_t)snprintf(peer, sizeof peer, "%s/%u", identity, number) >= sizeof peer || !*identity) {
        snprintf(why, why_bytes, "identity '%.40s': %zu bytes, want 1 to %d", identity, strlen(identity),
                 LINK_PEER_MAX - 16);
        return false;
    }
    struct link *l = link_new(ZMQ_DEALER, why, why_bytes);
    if (!l)
        return false;
    zsock_set_identity(l->socket, peer);
    zsock_set_reconnect_ivl(l->socket, RECONNECT_MS);
    zsock_set_reconnect_ivl_max(l->socket, RECONNECT_MAX_MS);
    if (zsock_connect(l->socket, "%s", endpoint) < 0) {
        snprintf(why, why_bytes, "cannot connect to %s: %s", endpoint, zmq_strerror(zmq_errno()));
        link_close(&l, 0);
        return false;
    }
    snprintf(l->endpoint, sizeof l->endpoint, "%s", endpoint);
    *ret = l;
    return true;
}

void link_close(struct link **link, int linger_ms)
{
    if (!link || !*link)
        return;
    zsock_set_linger((*link)->socket, linger_ms);
    zsock_destroy(&(*link)->socket);
    free(*link);
    *link = NULL;
}

const char *link_endpoint(const struct link *l)
{
    return l->endpoint;
}

/* --- receive --------------------------------------------------------------------------------------- */

struct frames {
    zmq_msg_t part[FRAMES_MAX];
    int count; /* received; only the first FRAMES_MAX are kept */
};

static void frames_done(struct frames *f)
{
    for (int i = 0; i < f->count && i < FRAMES_MAX; i++)
        zmq_msg_close(&f->part[i]);
}

/* Reads one message whole. Frames beyond those we know are read and dropped. */
static enum link_got frames_receive(struct link *l, struct frames *ret, char *why, size_t why_bytes)
{
    bool more = true;
    ret->count = 0;
    while (more) {
        zmq_msg_t beyond, *part = ret->count < FRAMES_MAX ? &ret->part[ret->count] : &beyond;
        zmq_msg_init(part);
        int got;
        do
            got = zmq_msg_recv(part, l->handle, ZMQ_DONTWAIT);
        while (got < 0 && zmq_errno() == EINTR);
        if (got < 0) {
            int error = zmq_errno();
            zmq_msg_close(part);
            frames_done(ret);
            if (error == EAGAIN && ret->count == 0)
                return LINK_EMPTY;
            snprintf(why, why_bytes, "receive: %s", zmq_strerror(error));
            return LINK_ERROR;
        }
        more = zmq_msg_more(part);
        if (ret->count >= FRAMES_MAX)
            zmq_msg_close(part);
        ret->count++;
    }
    return LINK_MESSAGE;
}

/* The routing id as text. Ours are "name/epoch/N"; a peer without one gets a binary id that no log can show. */
static bool peer_of(zmq_msg_t *part, char *peer, char *why, size_t why_bytes)
{
    const char *id = zmq_msg_data(part);
    size_t bytes = zmq_msg_size(part);
    peer[0] = 0;
    for (size_t i = 0; i < bytes; i++)
        if ((unsigned char)id[i] < 0x20 || id[i] == 0x7f) {
            snprintf(why, why_bytes, "a peer without a printable routing id; workers call themselves name/epoch/number");
            return false;
        }
    assert(bytes < LINK_PEER_MAX); /* libzmq: at most 255 */
    memcpy(peer, id, bytes);
    peer[bytes] = 0;
    return true;
}

enum link_got link_receive(struct link *l, struct msg *ret, char *peer, char *why, size_t why_bytes)
{
    struct frames f;
    char unwanted[LINK_PEER_MAX];
    int first = l->is_router ? 1 : 0;
    enum link_got got = frames_receive(l, &f, why, why_bytes);
    if (got != LINK_MESSAGE)
        return got;
    bool ok = !l->is_router || peer_of(&f.part[0], peer ? peer : unwanted, why, why_bytes);
    if (ok && f.count != first + 2) {
        snprintf(why, why_bytes, "a message of %d frames, want 2: head and body", f.count - first);
        ok = false;
    }
    if (ok)
        ok = msg_decode(ret, zmq_msg_data(&f.part[first]), zmq_msg_size(&f.part[first]),
                        zmq_msg_data(&f.part[first + 1]), zmq_msg_size(&f.part[first + 1]), why, why_bytes);
    frames_done(&f);
    return ok ? LINK_MESSAGE : LINK_BAD;
}

/* --- send ------------------------------------------------------------------------------------------ */

static int send_frame(struct link *l, const void *data, size_t bytes, int flags)
{
    int sent;
    do
        sent = zmq_send(l->handle, data, bytes, ZMQ_DONTWAIT | flags);
    while (sent < 0 && zmq_errno() == EINTR);
    return sent < 0 ? zmq_errno() : 0;
}

enum link_sent link_send(struct link *l, const char *peer, const struct msg *m)
{
    char why[256];
    uint8_t head[2];
    void *body;
    size_t bytes;
    assert(l->is_router == (peer != NULL));
    if (!msg_encode(m, head, &body, &bytes, why, sizeof why))
        return LINK_SEND_ERROR;
    /* Only the first frame can be refused: for the rest of the message libzmq has found its pipe. */
    int error = peer ? send_frame(l, peer, strlen(peer), ZMQ_SNDMORE) : 0;
    if (!error)
        error = send_frame(l, head, sizeof head, ZMQ_SNDMORE);
    if (!error)
        error = send_frame(l, body, bytes, 0);
    free(body);
    switch (error) {
    case 0: return LINK_SENT;
    case EHOSTUNREACH: return LINK_GONE;
    case EAGAIN: return LINK_FULL;
    default: return LINK_SEND_ERROR;
    }
}

unsigned link_wait(struct link *l, const int *extra, int extra_count, int timeout_ms)
{
    zmq_pollitem_t items[1 + EXTRA_MAX];
    assert(extra_count >= 0);
    assert(extra_count <= EXTRA_MAX);
    items[0] = (zmq_pollitem_t){.socket = l->handle, .events = ZMQ_POLLIN};
    for (int i = 0; i < extra_count; i++)
        items[1 + i] = (zmq_pollitem_t){.fd = extra[i], .events = ZMQ_POLLIN};
    if (zmq_poll(items, 1 + extra_count, timeout_ms) < 0)
        return 0; /* a signal: the caller looks around anyway */
    unsigned mask = 0;
    for (int i = 0; i < 1 + extra_count; i++)
        if (items[i].revents)
            mask |= 1u << i;
    return mask;
}
