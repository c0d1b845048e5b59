/* Tests of proto/link.c. Every trap of the socket library that once lost messages has its test here: a send to a
 * peer that is gone or full must say so, a second bind must not steal an endpoint, a reconnect must not be ignored. */
#include "link.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define PATIENCE_S 10

static char why[256];
static char folder[] = "/tmp/kiln-test-link-XXXXXX";

static struct link *bound(const char *endpoint)
{
    struct link *l;
    if (!link_bind(&l, endpoint, why, sizeof why))
        fail_msg("%s", why);
    return l;
}

static struct link *connected(const struct link *to, const char *identity)
{
    struct link *l;
    if (!link_connect(&l, link_endpoint(to), identity, why, sizeof why))
        fail_msg("%s", why);
    return l;
}

static enum link_got receive(struct link *l, struct msg *ret, char *peer)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    time_t until_s = now.tv_sec + PATIENCE_S;
    while (now.tv_sec < until_s) {
        enum link_got got = link_receive(l, ret, peer, why, sizeof why);
        if (got != LINK_EMPTY)
            return got;
        link_wait(l, NULL, 0, 100);
        clock_gettime(CLOCK_MONOTONIC, &now);
    }
    return LINK_EMPTY;
}

static void say_ready(struct link *l, const char *peer, uint32_t credit)
{
    struct msg m = {.kind = MSG_READY, .ready = {.credit = credit, .batch_max = 1}};
    assert_int_equal(link_send(l, peer, &m), LINK_SENT);
}

/* The first links of a process, made by many threads at once: the socket library sets itself up in the middle of it. A child each,
 * because a process has only one first time; none under ThreadSanitizer, whose children may not start threads: there one look
 * is enough. */
#define FIRST_THREADS 8
#ifdef __SANITIZE_THREAD__
#define FIRST_PROCESSES 0
#else
#define FIRST_PROCESSES 300
#endif

static void *connect_first(void *barrier)
{
    struct link *l;
    char reason[256];
    pthread_barrier_wait(barrier);
    if (!link_connect(&l, "tcp://127.0.0.1:9", "w1/1", reason, sizeof reason))
        return barrier;
    link_close(&l, 0);
    return NULL;
}

static int links_of_a_new_process(void)
{
    pthread_t threads[FIRST_THREADS];
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, FIRST_THREADS);
    for (int i = 0; i < FIRST_THREADS; i++)
        if (pthread_create(&threads[i], NULL, connect_first, &barrier))
            return 2;
    int failed = 0;
    for (int i = 0; i < FIRST_THREADS; i++) {
        void *said;
        pthread_join(threads[i], &said);
        failed |= said != NULL;
    }
    return failed;
}

static void the_first_links_may_be_made_by_many_threads(void **state)
{
    (void)state;
    for (int i = 0; i < FIRST_PROCESSES; i++) {
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0)
            _exit(links_of_a_new_process());
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_int_equal(status, 0);
    }
    assert_int_equal(links_of_a_new_process(), 0); /* this one's first, too */
}

static void messages_travel_both_ways_over(const char *endpoint)
{
    struct link *router = bound(endpoint), *dealer = connected(router, "w1/1");
    struct msg m;
    char peer[LINK_PEER_MAX];
    say_ready(dealer, NULL, 3);
    assert_int_equal(receive(router, &m, peer), LINK_MESSAGE);
    assert_int_equal(m.kind, MSG_READY);
    assert_int_equal(m.ready.credit, 3);
    assert_ptr_equal(strstr(peer, "w1/1/"), peer);
    msg_done(&m);
    say_ready(router, peer, 4);
    assert_int_equal(receive(dealer, &m, NULL), LINK_MESSAGE);
    assert_int_equal(m.ready.credit, 4);
    msg_done(&m);
    assert_int_equal(link_receive(dealer, &m, NULL, why, sizeof why), LINK_EMPTY);
    link_close(&dealer, 0);
    assert_null(dealer);
    link_close(&dealer, 0);
    link_close(&router, 0);
}

static void messages_travel_over_tcp(void **state)
{
    (void)state;
    messages_travel_both_ways_over("tcp://127.0.0.1:*");
}

static void messages_travel_over_ipc(void **state)
{
    (void)state;
    char endpoint[128];
    snprintf(endpoint, sizeof endpoint, "ipc://%s/a", folder);
    messages_travel_both_ways_over(endpoint);
    messages_travel_both_ways_over(endpoint); /* the file that the first one left is no hindrance */
}

static void only_loopback_is_accepted(void **state)
{
    (void)state;
    static const char *const refused[] = {"tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://192.168.0.1:5555", "tcp://127.0.0.1.example:5",
                                          "tcp://localhost:1", "ipc://", "ipc://@abstract", "ipc://*", "inproc://x", "pgm://x", ""};
    struct link *l;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        assert_false(link_bind(&l, refused[i], why, sizeof why));
        assert_non_null(strstr(why, "only this machine"));
        assert_false(link_connect(&l, refused[i], "w/1", why, sizeof why));
    }
    assert_false(link_bind(&l, "tcp://127.0.0.1:banana", why, sizeof why));
    assert_non_null(strstr(why, "cannot bind tcp://127.0.0.1:banana"));
    assert_false(link_connect(&l, "tcp://127.0.0.1:5555", "", why, sizeof why));
    char name[300];
    memset(name, 'n', sizeof name);
    name[299] = 0;
    assert_false(link_connect(&l, "tcp://127.0.0.1:5555", name, why, sizeof why));
}

static void taken_endpoints_are_refused_by_name(void **state)
{
    (void)state;
    struct link *l, *first = bound("tcp://127.0.0.1:*");
    assert_null(strchr(link_endpoint(first), '*'));
    assert_false(link_bind(&l, link_endpoint(first), why, sizeof why));
    assert_non_null(strstr(why, link_endpoint(first)));
    assert_non_null(strstr(why, "in use"));
    link_close(&first, 0);
    char endpoint[128];
    snprintf(endpoint, sizeof endpoint, "ipc://%s/taken", folder);
    first = bound(endpoint);
    assert_false(link_bind(&l, endpoint, why, sizeof why));
    assert_non_null(strstr(why, "another process answers there"));
    link_close(&first, 0);
}

static void a_peer_that_is_gone_is_reported(void **state)
{
    (void)state;
    struct link *router = bound("tcp://127.0.0.1:*");
    struct msg m = {.kind = MSG_READY};
    assert_int_equal(link_send(router, "nobody/1/1", &m), LINK_GONE);
    link_close(&router, 0);
}

/* A stalled worker: messages pile up until the queue is full, and none is lost silently. */
static void a_full_queue_is_reported_and_nothing_sent_is_lost(void **state)
{
    (void)state;
    char endpoint[128], peer[LINK_PEER_MAX];
    snprintf(endpoint, sizeof endpoint, "ipc://%s/full", folder);
    struct link *router = bound(endpoint), *dealer = connected(router, "w1/1");
    struct msg m;
    say_ready(dealer, NULL, 1);
    assert_int_equal(receive(router, &m, peer), LINK_MESSAGE);
    msg_done(&m);
    int sent = 0;
    enum link_sent got;
    uint64_t *tasks = calloc(MSG_ITEMS_MAX, sizeof *tasks);
    struct msg big = {.kind = MSG_CANCEL, .cancel = {MSG_ITEMS_MAX, tasks, ""}};
    while ((got = link_send(router, peer, &big)) == LINK_SENT && sent < 1000000)
        sent++;
    assert_int_equal(got, LINK_FULL);
    int received = 0;
    while (received < sent && receive(dealer, &m, NULL) == LINK_MESSAGE) {
        msg_done(&m);
        received++;
    }
    assert_int_equal(received, sent);
    free(tasks);
    link_close(&dealer, 0);
    link_close(&router, 0);
}

/* The coordinator has not yet read what the old socket sent when the new one comes: it must still be heard. */
static void a_reconnected_worker_is_heard_at_once(void **state)
{
    (void)state;
    struct link *router = bound("tcp://127.0.0.1:*");
    struct link *old = connected(router, "w1/1");
    struct msg m;
    char first[LINK_PEER_MAX], second[LINK_PEER_MAX];
    say_ready(old, NULL, 1);
    say_ready(old, NULL, 1);
    assert_int_equal(receive(router, &m, first), LINK_MESSAGE);
    msg_done(&m);
    struct link *new = connected(router, "w1/1");
    say_ready(new, NULL, 2);
    uint32_t highest = 0;
    for (int i = 0; i < 2 && receive(router, &m, second) == LINK_MESSAGE; i++) {
        highest = m.ready.credit > highest ? m.ready.credit : highest;
        msg_done(&m);
    }
    assert_int_equal(highest, 2);
    assert_string_not_equal(first, second);
    link_close(&old, 0);
    link_close(&new, 0);
    link_close(&router, 0);
}

static void what_was_said_before_closing_arrives(void **state)
{
    (void)state;
    struct link *router = bound("tcp://127.0.0.1:*"), *dealer = connected(router, "w1/1");
    struct msg m = {.kind = MSG_BYE, .bye = {"drained"}};
    assert_int_equal(link_send(dealer, NULL, &m), LINK_SENT);
    link_close(&dealer, 2000);
    assert_int_equal(receive(router, &m, NULL), LINK_MESSAGE);
    assert_string_equal(m.bye.reason, "drained");
    msg_done(&m);
    link_close(&router, 0);
}

/* A stranger who speaks the transport but not our messages: read, refused with a sentence, nothing else harmed. */
static void bytes_that_are_no_message_are_bad_not_fatal(void **state)
{
    (void)state;
    struct link *router = bound("tcp://127.0.0.1:*"), *dealer = connected(router, "w1/1");
    char command[1024], peer[LINK_PEER_MAX] = "x";
    snprintf(command, sizeof command,
             "python3 -c \"\nimport socket,struct\n"
             "s=socket.create_connection(('127.0.0.1',int('%s'.rsplit(':',1)[1])))\n"
             "def take(n):\n  while n: n-=len(s.recv(n))\n"
             "s.sendall(b'\\xff'+bytes(8)+b'\\x7f')\ntake(10)\n"
             "s.sendall(bytes([3,0])+b'NULL'+bytes(16)+bytes(1)+bytes(31))\ntake(54)\n"
             "b=b'\\x05READY\\x0bSocket-Type'+struct.pack('>I',6)+b'DEALER\\x08Identity'+struct.pack('>I',5)+b'bad/1'\n"
             "s.sendall(bytes([4,len(b)])+b)\ntake(2)\n"
             "s.sendall(bytes([0,3])+b'one')\n"
             "s.sendall(bytes([1,2])+bytes([2,4])+bytes([0,1])+bytes([0xc1]))\n"
             "import time; time.sleep(1)\"",
             link_endpoint(router));
    FILE *stranger = popen(command, "r");
    assert_non_null(stranger);
    struct msg m;
    assert_int_equal(receive(router, &m, peer), LINK_BAD);
    assert_string_equal(peer, "bad/1");
    assert_non_null(strstr(why, "1 frames, want 2"));
    assert_int_equal(receive(router, &m, peer), LINK_BAD);
    assert_non_null(strstr(why, "ready: byte 0xc1"));
    assert_int_equal(pclose(stranger), 0);
    say_ready(dealer, NULL, 5);
    assert_int_equal(receive(router, &m, peer), LINK_MESSAGE);
    assert_int_equal(m.ready.credit, 5);
    msg_done(&m);
    link_close(&dealer, 0);
    link_close(&router, 0);
}

static void waiting_ends_when_another_file_is_readable(void **state)
{
    (void)state;
    int pipes[2];
    assert_int_equal(pipe(pipes), 0);
    struct link *router = bound("tcp://127.0.0.1:*");
    assert_int_equal(link_wait(router, pipes, 1, 20), 0);
    assert_int_equal(write(pipes[1], "x", 1), 1);
    assert_int_equal(link_wait(router, pipes, 1, 1000 * PATIENCE_S), 2);
    link_close(&router, 0);
    close(pipes[0]);
    close(pipes[1]);
}

static void signals_stay_with_the_program(void **state)
{
    (void)state;
    struct sigaction before, after;
    sigaction(SIGTERM, NULL, &before);
    struct link *router = bound("tcp://127.0.0.1:*");
    sigaction(SIGTERM, NULL, &after);
    assert_ptr_equal(before.sa_handler, after.sa_handler);
    assert_ptr_equal(after.sa_handler, SIG_DFL);
    link_close(&router, 0);
}

static void *echo(void *endpoint)
{
    struct link *l;
    struct msg m;
    char text[256];
    if (!link_connect(&l, endpoint, "echo/1", text, sizeof text))
        return NULL;
    struct msg hello = {.kind = MSG_READY};
    link_send(l, NULL, &hello);
    for (int i = 0; i < 500;) {
        if (link_receive(l, &m, NULL, text, sizeof text) == LINK_MESSAGE) {
            link_send(l, NULL, &m);
            msg_done(&m);
            i++;
        } else {
            link_wait(l, NULL, 0, 100);
        }
    }
    link_close(&l, 1000);
    return NULL;
}

static void two_threads_with_a_link_each_do_not_meet(void **state)
{
    (void)state;
    struct link *router = bound("tcp://127.0.0.1:*");
    pthread_t thread;
    struct msg m;
    char peer[LINK_PEER_MAX];
    assert_int_equal(pthread_create(&thread, NULL, echo, (void *)link_endpoint(router)), 0);
    assert_int_equal(receive(router, &m, peer), LINK_MESSAGE);
    msg_done(&m);
    for (uint32_t i = 0; i < 500; i++) {
        say_ready(router, peer, i);
        assert_int_equal(receive(router, &m, peer), LINK_MESSAGE);
        assert_int_equal(m.ready.credit, i);
        msg_done(&m);
    }
    pthread_join(thread, NULL);
    link_close(&router, 0);
}

static int remove_folder(void **state)
{
    (void)state;
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_first_links_may_be_made_by_many_threads), /* first: a child inherits what was set up */
        cmocka_unit_test(signals_stay_with_the_program),
        cmocka_unit_test(messages_travel_over_tcp),
        cmocka_unit_test(messages_travel_over_ipc),
        cmocka_unit_test(only_loopback_is_accepted),
        cmocka_unit_test(taken_endpoints_are_refused_by_name),
        cmocka_unit_test(a_peer_that_is_gone_is_reported),
        cmocka_unit_test(a_full_queue_is_reported_and_nothing_sent_is_lost),
        cmocka_unit_test(a_reconnected_worker_is_heard_at_once),
        cmocka_unit_test(what_was_said_before_closing_arrives),
        cmocka_unit_test(bytes_that_are_no_message_are_bad_not_fatal),
        cmocka_unit_test(waiting_ends_when_another_file_is_readable),
        cmocka_unit_test(two_threads_with_a_link_each_do_not_meet),
    };
    if (!mkdtemp(folder))
        return 1;
    return cmocka_run_group_tests(tests, NULL, remove_folder);
}
