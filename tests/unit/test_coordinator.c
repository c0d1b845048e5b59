/* test_coordinator.c - the real kiln-coordinator on a real PostgreSQL, with workers made by hand over link.h. If these break,
 * images are lost or rendered twice when something dies, or the farm stands still.
 * argv[1]: kiln-coordinator. Paces are fast (leases 3 s, silence 600 ms); nothing depends on how fast the machine is. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "link.h"
#include "store_dir.h"
#include "test_server.h"

#define PATIENCE_MS 20000
#define BEAT_MS 100
#define HELD_MAX 256
#define HANDS_MAX 8
#define SHA "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

extern char **environ;

static struct test_server server;
static const char *program;
static char dir[64], endpoint[128], log_path[128], state_path[128], out_dir[128];
static pid_t coordinators[2];

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* --- the coordinator ------------------------------------------------------------------------------------------- */

static pid_t spawn(const char *at, const char *const *words)
{
    const char *argv[40] = {program, "--bind", at, "--database", server.uri, "--log-level", "debug", "--heartbeat-ms", "100",
                            "--silent-ms", "600", "--lease-ms", "3000"};
    int argc = 13;
    pid_t pid;
    posix_spawn_file_actions_t actions;
    for (int i = 0; words && words[i]; i++)
        argv[argc++] = words[i];
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 2, log_path, O_WRONLY | O_CREAT | O_APPEND, 0666);
    assert_int_equal(posix_spawn(&pid, program, &actions, NULL, (char **)(uintptr_t)argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    return pid;
}

static bool file_says(const char *path, const char *text)
{
    static char content[1 << 20];
    FILE *f = fopen(path, "r");
    size_t n = f ? fread(content, 1, sizeof content - 1, f) : 0;
    if (f)
        fclose(f);
    content[n] = '\0';
    return strstr(content, text) != NULL;
}

static void wait_for_file(const char *path, const char *text)
{
    for (int64_t end_ms = now_ms() + PATIENCE_MS; !file_says(path, text); usleep(5000))
        if (now_ms() > end_ms)
            fail_msg("%s does not say %s", path, text);
}

static void start(const char *const *words)
{
    const char *all[20] = {"--state-file", state_path};
    for (int i = 0; words && words[i]; i++)
        all[2 + i] = words[i];
    unlink(state_path);
    coordinators[0] = spawn(endpoint, all);
    wait_for_file(state_path, "\"up\"");
}

static int ended(pid_t pid)
{
    int status = 0;
    for (int64_t end_ms = now_ms() + PATIENCE_MS; waitpid(pid, &status, WNOHANG) == 0; usleep(5000))
        if (now_ms() > end_ms)
            fail_msg("the coordinator does not end");
    for (int i = 0; i < 2; i++)
        if (coordinators[i] == pid)
            coordinators[i] = 0;
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static int stop(int number)
{
    pid_t pid = coordinators[0];
    kill(pid, number);
    return ended(pid);
}

/* --- workers by hand ------------------------------------------------------------------------------------------- */

struct hand {
    char name[32], campaign[64], model[64], reason[512];
    struct link *link;
    uint64_t epoch, beat_number;
    const char *licence, *digest; /* digest NULL: "d" */
    bool is_mute, is_final;
    int64_t beat_ms;
    struct msg_held held[HELD_MAX];   /* what it was assigned and has not been answered about */
    uint64_t seeds[HELD_MAX];
    int held_count, batches, largest_batch, acked, stale, cancelled, welcomes, refusals, most_held;
};
static struct hand hands[HANDS_MAX];
static int hand_count;

static void say(struct hand *h, const struct msg *m)
{
    assert_int_equal(link_send(h->link, NULL, m), LINK_SENT);
}

static void hello_as(struct hand *h, const char *const *models, int model_count)
{
    struct msg m = {.kind = MSG_HELLO, .hello = {.protocol_min = MSG_VERSION, .protocol_max = MSG_VERSION, .software = "test", .worker = h->name, .boot_epoch = h->epoch,
                    .device = "hand", .precision = "f32", .host = "here", .pid = 7, .model_count = (uint32_t)model_count}};
    for (int i = 0; i < model_count; i++)
        m.hello.models[i] = (struct msg_model){models[i], h->digest ? h->digest : "d", "pocket", h->licence, true};
    say(h, &m);
}

static void hello(struct hand *h)
{
    static const char *const models[] = {"tiny"};
    hello_as(h, models, 1);
}

static void connect_hand(struct hand *h)
{
    char identity[64], why[256];
    snprintf(identity, sizeof identity, "%s/%" PRIu64, h->name, h->epoch);
    link_close(&h->link, 0);
    if (!link_connect(&h->link, endpoint, identity, why, sizeof why))
        fail_msg("%s", why);
}

static struct hand *hand_new(const char *name, uint64_t epoch)
{
    struct hand *h = &hands[hand_count++];
    assert_true(hand_count <= HANDS_MAX);
    memset(h, 0, sizeof *h);
    snprintf(h->name, sizeof h->name, "%s", name);
    h->epoch = epoch;
    h->licence = "Apache-2.0";
    connect_hand(h);
    return h;
}

static void ready(struct hand *h, uint32_t credit, uint32_t batch_max, bool with_held)
{
    struct msg m = {.kind = MSG_READY, .ready = {.credit = credit, .batch_max = batch_max, .held_count = with_held ? (uint32_t)h->held_count : 0, .held = h->held}};
    say(h, &m);
}

static void note_assign(struct hand *h, const struct msg_assign *a)
{
    snprintf(h->campaign, sizeof h->campaign, "%s", a->campaign);
    snprintf(h->model, sizeof h->model, "%s", a->model);
    for (uint32_t i = 0; i < a->count; i++) {
        assert_true(h->held_count < HELD_MAX);
        h->seeds[h->held_count] = a->tasks[i].seed;
        h->held[h->held_count++] = (struct msg_held){a->tasks[i].task, a->tasks[i].token};
    }
    h->batches++;
    if ((int)a->count > h->largest_batch)
        h->largest_batch = (int)a->count;
    if (h->held_count > h->most_held)
        h->most_held = h->held_count;
}

static void note_acks(struct hand *h, const struct msg_ack *acks)
{
    for (uint32_t i = 0; i < acks->count; i++) {
        h->acked++;
        h->stale += acks->items[i].verdict == MSG_STALE;
        for (int k = 0; k < h->held_count; k++)
            if (h->held[k].task == acks->items[i].task && h->held[k].token == acks->items[i].token) {
                h->held[k] = h->held[--h->held_count];
                h->seeds[k] = h->seeds[h->held_count];
                break;
            }
    }
}

static void note(struct hand *h, const struct msg *m)
{
    switch (m->kind) {
    case MSG_WELCOME: h->welcomes++; break;
    case MSG_REFUSED:
        h->refusals++;
        h->is_final = m->refused.is_final;
        snprintf(h->reason, sizeof h->reason, "%s", m->refused.reason);
        break;
    case MSG_ASSIGN: note_assign(h, &m->assign); break;
    case MSG_ACK: note_acks(h, &m->ack); break;
    case MSG_CANCEL: h->cancelled += (int)m->cancel.count; break;
    default: break;
    }
}

/* pump lets every hand hear and beat for a moment. */
static void pump(void)
{
    for (int i = 0; i < hand_count; i++) {
        struct hand *h = &hands[i];
        struct msg m;
        char why[256];
        while (h->link && link_receive(h->link, &m, NULL, why, sizeof why) == LINK_MESSAGE) {
            note(h, &m);
            msg_done(&m);
        }
        if (h->link && !h->is_mute && h->welcomes > 0 && now_ms() >= h->beat_ms) {
            struct msg beat = {.kind = MSG_HEARTBEAT, .heartbeat = {.step_counter = h->beat_number++, .held = (uint32_t)h->held_count, .state = "rendering"}};
            h->beat_ms = now_ms() + BEAT_MS;
            say(h, &beat);
        }
    }
    usleep(1000);
}

#define UNTIL(condition)                                                              \
    do {                                                                              \
        for (int64_t end_ms_ = now_ms() + PATIENCE_MS; !(condition); pump())          \
            if (now_ms() > end_ms_)                                                   \
                fail_msg("line %d: never " #condition, __LINE__);                     \
    } while (0)

static void pump_for(int ms)
{
    for (int64_t end_ms = now_ms() + ms; now_ms() < end_ms;)
        pump();
}

/* The hands go on beating while the server is stopped or started, however long a busy machine takes for it. */
static void control_while_pumping(const char *verb)
{
    int status = -1;
    pid_t child = fork();
    if (child == 0) {
        test_server_control(&server, verb);
        _exit(0);
    }
    assert_true(child > 0);
    UNTIL(waitpid(child, &status, WNOHANG) == child);
    assert_int_equal(status, 0);
}

static struct hand *join(const char *name, uint64_t epoch, uint32_t credit, uint32_t batch_max)
{
    struct hand *h = hand_new(name, epoch);
    hello(h);
    UNTIL(h->welcomes == 1);
    ready(h, credit, batch_max, false);
    return h;
}

static void result(struct hand *h, const struct msg_held *held, const uint64_t *seeds, int count)
{
    struct msg_result_item items[HELD_MAX];
    for (int i = 0; i < count; i++)
        items[i] = (struct msg_result_item){.task = held[i].task, .token = held[i].token, .sha256 = SHA, .bytes = 1000, .width = 512, .height = 512,
                                            .steps = 4, .guidance = 1, .seed = seeds[i], .file = "f.png", .digest = "d", .render_s = 0.5};
    struct msg m = {.kind = MSG_RESULT, .result = {.count = (uint32_t)count, .items = items}};
    say(h, &m);
}

static void fail_all(struct hand *h, enum msg_failure kind, const char *reason)
{
    struct msg_failed_item items[HELD_MAX];
    for (int i = 0; i < h->held_count; i++)
        items[i] = (struct msg_failed_item){h->held[i].task, h->held[i].token, kind, reason};
    struct msg m = {.kind = MSG_FAILED, .failed = {.count = (uint32_t)h->held_count, .items = items}};
    say(h, &m);
}

/* work renders nothing and reports everything until the campaign has no task left. */
static void work(const char *campaign, int64_t total)
{
    int64_t end_ms = now_ms() + 2 * PATIENCE_MS, look_ms = 0;
    for (;;) {
        for (int i = 0; i < hand_count; i++)
            if (hands[i].held_count > 0 && !hands[i].is_mute)
                result(&hands[i], hands[i].held, hands[i].seeds, hands[i].held_count);
        int acked = hands[0].acked;
        for (int k = 0; k < 50 && hands[0].acked == acked; k++)
            pump();
        if (now_ms() >= look_ms) {
            if (test_server_number(&server, "select count(*) from image i join campaign c on c.id = campaign_id where c.name = '%s'", campaign) == total)
                return;
            look_ms = now_ms() + 100;
        }
        if (now_ms() > end_ms)
            fail_msg("campaign %s does not end", campaign);
    }
}

static void leave(struct hand *h)
{
    link_close(&h->link, 0);
    h->held_count = 0;
}

/* --- set up ---------------------------------------------------------------------------------------------------- */

static int setup(void **state)
{
    (void)state;
    test_server_empty(&server);
    unlink(log_path);
    hand_count = 0;
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    for (int i = 0; i < hand_count; i++)
        link_close(&hands[i].link, 0);
    for (int i = 0; i < 2; i++)
        if (coordinators[i] > 0) {
            kill(coordinators[i], SIGKILL);
            waitpid(coordinators[i], NULL, 0);
            coordinators[i] = 0;
        }
    hand_count = 0;
    return 0;
}

static int64_t images(void)
{
    return test_server_number(&server, "select count(*) from image");
}

/* --- the main way ---------------------------------------------------------------------------------------------- */

static void campaign_ends_with_every_image_once(void **state)
{
    (void)state;
    test_server_submit(&server, "all", 500, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 8, 4), *b = join("b", 1, 32, 16);
    work("all", 500);
    assert_int_equal(images(), 500);
    assert_int_equal(test_server_number(&server, "select count(distinct worker) from image"), 2);
    assert_true(a->most_held <= 8 && a->largest_batch <= 4);
    assert_true(b->most_held <= 32 && b->largest_batch <= 16);
    UNTIL(a->held_count + b->held_count == 0);
    assert_int_equal(a->stale + b->stale, 0);
    assert_int_equal(stop(SIGTERM), 0);
    assert_int_not_equal(access(state_path, F_OK), 0);
    test_server_audit(&server);
}

static void next_batch_is_there_before_the_last_ends(void **state)
{
    (void)state;
    test_server_submit(&server, "pre", 40, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 8, 4);
    UNTIL(a->held_count == 8);
    assert_int_equal(a->batches, 2);
    /* two of four reported: no half batch comes */
    result(a, a->held, a->seeds, 2);
    UNTIL(a->held_count == 6);
    pump_for(300);
    assert_int_equal(a->batches, 2);
    result(a, a->held, a->seeds, 2);
    UNTIL(a->batches == 3);
    UNTIL(a->held_count == 8);
    assert_int_equal(a->most_held, 8);
}

static void last_tasks_are_shared(void **state)
{
    (void)state;
    start(NULL);
    struct hand *a = join("a", 1, 8, 4), *b = join("b", 1, 8, 4), *c = join("c", 1, 8, 4);
    pump_for(300); /* all three are known before there is anything to share */
    test_server_submit(&server, "few", 10, NULL);
    UNTIL(a->held_count + b->held_count + c->held_count == 10);
    assert_true(a->held_count >= 3 && a->held_count <= 4);
    assert_true(b->held_count >= 3 && b->held_count <= 4);
    assert_true(c->held_count >= 3 && c->held_count <= 4);
}

static void submit_wakes_an_idle_farm(void **state)
{
    (void)state;
    start(NULL);
    struct hand *a = join("a", 1, 8, 4);
    pump_for(1500);
    test_server_submit(&server, "late", 4, NULL);
    UNTIL(a->held_count == 4);
    work("late", 4);
}

/* --- reports --------------------------------------------------------------------------------------------------- */

static void same_result_is_answered_each_time(void **state)
{
    (void)state;
    test_server_submit(&server, "twice", 1, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 1, 1);
    UNTIL(a->held_count == 1);
    struct msg_held held = a->held[0];
    uint64_t seed = a->seeds[0];
    result(a, &held, &seed, 1);
    UNTIL(a->acked == 1);
    result(a, &held, &seed, 1);
    UNTIL(a->acked == 2);
    assert_int_equal(a->stale, 0);
    assert_int_equal(images(), 1);
    /* a token nobody ever had */
    held.token += 5;
    result(a, &held, &seed, 1);
    UNTIL(a->acked == 3);
    assert_int_equal(a->stale, 1);
    assert_int_equal(images(), 1);
    test_server_audit(&server);
}

static void failures_keep_their_kind(void **state)
{
    (void)state;
    test_server_submit(&server, "kinds", 1, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 4, 4);
    UNTIL(a->held_count == 1);
    fail_all(a, MSG_FAILURE_RELEASED, "not now");
    UNTIL(a->acked == 1 && a->held_count == 1); /* back at once, no attempt counted */
    assert_int_equal(a->held[0].token, 2);
    assert_int_equal(test_server_number(&server, "select attempt from task"), 1);
    fail_all(a, MSG_FAILURE_RETRY, "disk hiccup");
    UNTIL(a->acked == 2);
    assert_int_equal(test_server_number(&server, "select attempt from task"), 1);
    assert_int_equal(test_server_number(&server, "select (not_before > now())::int from task"), 1);
    UNTIL(a->held_count == 1);
    fail_all(a, MSG_FAILURE_REFUSE, "prompt of 600 tokens");
    UNTIL(a->acked == 3);
    assert_int_equal(a->stale, 0);
    assert_int_equal(test_server_number(&server, "select count(*) from outcome where state = 'failed' and kind = 'refuse' and reason = 'prompt of 600 tokens'"), 1);
    test_server_audit(&server);
}

static void memory_that_ran_out_halves_the_batch(void **state)
{
    (void)state;
    test_server_submit(&server, "oom", 100, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 8, 8);
    UNTIL(a->held_count == 8);
    a->largest_batch = 0;
    fail_all(a, MSG_FAILURE_OOM, "8 images do not fit");
    UNTIL(a->acked == 8);
    UNTIL(a->held_count == 8);
    assert_int_equal(a->largest_batch, 4);
    assert_true(file_says(log_path, "batch_cap_lowered worker=a pixels=262144 cap=4"));
}

/* --- workers come and go --------------------------------------------------------------------------------------- */

static void tasks_of_a_vanished_worker_go_to_another_with_a_higher_token(void **state)
{
    (void)state;
    test_server_submit(&server, "vanish", 4, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 4, 4);
    UNTIL(a->held_count == 4);
    struct msg_held late = a->held[0];
    uint64_t seed = a->seeds[0];
    a->is_mute = true;
    struct hand *b = join("b", 1, 4, 4);
    UNTIL(b->held_count == 4);
    for (int i = 0; i < 4; i++)
        assert_int_equal(b->held[i].token, 2);
    assert_int_equal(test_server_number(&server, "select sum(lost) from task"), 4);
    /* it comes back with an image: too late, said so, and told to stop the others */
    result(a, &late, &seed, 1);
    UNTIL(a->acked == 1);
    assert_int_equal(a->stale, 1);
    assert_int_equal(a->cancelled, 4);
    a->held_count = 0;
    work("vanish", 4);
    assert_int_equal(images(), 4);
    test_server_audit(&server);
}

static void process_that_was_started_again_gives_back_at_once_what_it_lost(void **state)
{
    (void)state;
    test_server_submit(&server, "again", 4, NULL);
    start((const char *const[]){"--silent-ms", "15000", "--heartbeat-ms", "5000", "--lease-ms", "60000", NULL});
    struct hand *a = join("a", 1, 4, 4);
    UNTIL(a->held_count == 4);
    struct msg_held held[4];
    uint64_t seeds[4];
    memcpy(held, a->held, sizeof held);
    memcpy(seeds, a->seeds, sizeof seeds);
    leave(a); /* killed: its socket is closed, its spool has one result */
    int64_t from_ms = now_ms();
    pump_for(200);
    struct hand *a2 = hand_new("a", 2);
    hello(a2);
    UNTIL(a2->welcomes == 1);
    result(a2, held, seeds, 1);
    UNTIL(a2->acked == 1);
    assert_int_equal(a2->stale, 0);
    assert_int_equal(test_server_number(&server, "select count(*) from task where state = 1"), 3); /* not before READY */
    ready(a2, 4, 4, false);
    UNTIL(a2->held_count == 3);
    assert_true(now_ms() - from_ms < 5000);
    work("again", 4);
    test_server_audit(&server);
}

static void second_living_process_of_a_name_is_refused(void **state)
{
    (void)state;
    start(NULL);
    struct hand *a = join("a", 1, 4, 4);
    pump_for(200);
    struct hand *other = hand_new("a", 2);
    hello(other);
    UNTIL(other->refusals == 1);
    assert_false(other->is_final);
    assert_non_null(strstr(other->reason, "a worker named 'a' is there already (host here, pid 7"));
    /* the first one is not harmed */
    test_server_submit(&server, "name", 2, NULL);
    UNTIL(a->held_count == 2);
    a->is_mute = true;
    pump_for(700);
    hello(other);
    UNTIL(other->welcomes == 1);
}

static void other_weights_of_the_same_name_are_refused_while_the_first_live(void **state)
{
    (void)state;
    static const char *const models[] = {"tiny"};
    start(NULL);
    struct hand *a = join("a", 1, 4, 4);
    pump_for(200);
    struct hand *b = hand_new("b", 2);
    b->digest = "e";
    hello_as(b, models, 1);
    UNTIL(b->refusals == 1);
    assert_false(b->is_final);
    assert_non_null(strstr(b->reason, "model 'tiny' has other weights here than on worker 'a' (digest d"));
    b->digest = NULL;
    hello_as(b, models, 1); /* the same weights are welcome */
    UNTIL(b->welcomes == 1);
    leave(a);
    leave(b);
    pump_for(300);
    struct hand *next = hand_new("c", 3);
    next->digest = "e";
    hello_as(next, models, 1); /* nobody is left who has others */
    UNTIL(next->welcomes == 1);
}

static void reconnected_worker_goes_on(void **state)
{
    (void)state;
    test_server_submit(&server, "re", 8, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 4, 4);
    UNTIL(a->held_count == 4);
    connect_hand(a); /* another routing id, the same process */
    a->held_count = 2; /* the message with the other two never arrived */
    hello(a);
    UNTIL(a->welcomes == 2);
    ready(a, 4, 4, true);
    UNTIL(a->held_count == 6); /* credit counts beside what it held */
    assert_int_equal(test_server_number(&server, "select sum(lost) from task"), 0);
    work("re", 8);
    assert_int_equal(a->stale, 0);
    test_server_audit(&server);
}

static void bye_gives_back_at_once(void **state)
{
    (void)state;
    test_server_submit(&server, "bye", 4, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 4, 4);
    UNTIL(a->held_count == 4);
    struct msg bye = {.kind = MSG_BYE, .bye = {.reason = "drained"}};
    say(a, &bye);
    UNTIL(test_server_number(&server, "select count(*) from task where state = 0 and attempt = 0 and lost = 0") == 4);
    UNTIL(test_server_number(&server, "select count(*) from worker where name = 'a' and state = 'gone' and held = 0") == 1);
    leave(a);
    test_server_audit(&server);
}

static void states_of_workers_are_in_the_database(void **state)
{
    (void)state;
    start(NULL);
    struct hand *a = join("a", 1, 4, 4);
    UNTIL(test_server_number(&server, "select count(*) from worker where state = 'idle' and device = 'hand' and models = 'tiny' and host = 'here'") == 1);
    test_server_submit(&server, "states", 4, NULL);
    UNTIL(test_server_number(&server, "select count(*) from worker where state = 'busy' and held = 4") == 1);
    struct msg beat = {.kind = MSG_HEARTBEAT, .heartbeat = {.state = "blocked: no space in /out"}};
    a->is_mute = true; /* the next beats are ours */
    say(a, &beat);
    UNTIL(test_server_number(&server, "select count(*) from worker where state = 'blocked: no space in /out'") == 1);
    UNTIL(test_server_number(&server, "select count(*) from worker where state = 'silent'") == 1);
}

static void worker_that_makes_no_step_is_told_of(void **state)
{
    (void)state;
    test_server_submit(&server, "stuck", 4, NULL);
    start((const char *const[]){"--stuck-ms", "500", NULL});
    struct hand *a = join("a", 1, 4, 4);
    UNTIL(a->held_count == 4);
    a->is_mute = true;
    struct msg beat = {.kind = MSG_HEARTBEAT, .heartbeat = {.step_counter = 3, .held = 4, .state = "rendering"}};
    for (int i = 0; i < 20; i++) {
        say(a, &beat);
        pump_for(100);
    }
    assert_true(file_says(log_path, "worker_stuck worker=a step_counter=3"));
    assert_int_equal(test_server_number(&server, "select count(*) from task where state = 1"), 4);
}

/* --- whom we do not talk to ------------------------------------------------------------------------------------ */

static void strangers_are_refused_with_a_sentence(void **state)
{
    (void)state;
    start(NULL);
    struct hand *a = hand_new("a", 1);
    ready(a, 4, 4, false);
    UNTIL(a->refusals == 1);
    assert_string_equal(a->reason, "say hello first");
    assert_false(a->is_final);
    struct msg newer = {.kind = MSG_HELLO, .hello = {.protocol_min = 7, .protocol_max = 9, .software = "kiln 9", .worker = "a", .boot_epoch = 1,
                        .device = "", .precision = "", .host = ""}};
    say(a, &newer);
    UNTIL(a->refusals == 2);
    assert_true(a->is_final);
    assert_non_null(strstr(a->reason, "kiln 9 speaks protocol 7 to 9"));
    newer.hello.protocol_min = 1;
    newer.hello.worker = "../etc";
    say(a, &newer);
    UNTIL(a->refusals == 3);
    assert_true(a->is_final);
    assert_non_null(strstr(a->reason, "worker name '../etc'"));
    newer.hello.worker = "a";
    say(a, &newer);
    UNTIL(a->welcomes == 1);
}

/* Raw bytes on the socket: no ZeroMQ peer at all, and one that is cut in the middle. */
static void garbage_harms_nobody(void **state)
{
    (void)state;
    test_server_submit(&server, "garbage", 50, NULL);
    unlink(state_path);
    coordinators[0] = spawn("tcp://127.0.0.1:*", (const char *const[]){"--state-file", state_path, NULL});
    wait_for_file(state_path, "\"up\"");
    char text[512] = "", kept[sizeof endpoint];
    FILE *f = fopen(state_path, "r");
    assert_non_null(f);
    assert_non_null(fgets(text, sizeof text, f));
    fclose(f);
    memcpy(kept, endpoint, sizeof kept);
    assert_int_equal(sscanf(strstr(text, "\"endpoint\":\""), "\"endpoint\":\"%127[^\"]", endpoint), 1);
    for (int i = 0; i < 20; i++) {
        char noise[4096];
        for (size_t k = 0; k < sizeof noise; k++)
            noise[k] = (char)(k * 31 + (size_t)i * 17);
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        struct { uint16_t family, port; uint32_t address; char zero[8]; } to = {AF_INET, 0, 0x0100007f, {0}};
        unsigned port = (unsigned)atoi(strrchr(endpoint, ':') + 1);
        to.port = (uint16_t)(port << 8 | port >> 8);
        assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
        assert_true(send(fd, noise, sizeof noise, MSG_NOSIGNAL) > 0);
        close(fd);
    }
    /* what a worker never says, and numbers no image has */
    struct hand *a = join("a", 1, 8, 4);
    struct msg welcome = {.kind = MSG_WELCOME, .welcome = {.coordinator = "me"}};
    say(a, &welcome);
    struct msg_held odd[] = {{0, 0}, {UINT64_MAX, UINT64_MAX}, {1, 0}};
    uint64_t seeds[3] = {0};
    result(a, odd, seeds, 3);
    struct msg_result_item wrong = {.task = 1, .token = 1, .sha256 = "no", .bytes = UINT64_MAX, .width = UINT32_MAX, .height = 1, .steps = 0,
                                    .guidance = (double)NAN, .file = "", .digest = "", .render_s = (double)NAN};
    struct msg m = {.kind = MSG_RESULT, .result = {.count = 1, .items = &wrong}};
    say(a, &m);
    UNTIL(a->acked == 4);
    assert_int_equal(a->stale, 4);
    work("garbage", 50);
    assert_int_equal(stop(SIGTERM), 0);
    memcpy(endpoint, kept, sizeof kept);
    test_server_audit(&server);
}

/* --- the database and the coordinator come and go -------------------------------------------------------------- */

static void coordinator_killed_and_started_again_adopts_what_runs(void **state)
{
    (void)state;
    test_server_submit(&server, "kill", 12, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 8, 4);
    UNTIL(a->held_count == 8);
    assert_int_equal(stop(SIGKILL), 128 + SIGKILL);
    pump_for(300);
    connect_hand(a);
    a->welcomes = 0;
    start(NULL);
    /* it speaks before it said hello: the new one does not know it */
    result(a, a->held, a->seeds, 1);
    UNTIL(a->refusals == 1);
    hello(a);
    UNTIL(a->welcomes == 1);
    result(a, a->held, a->seeds, 1);
    UNTIL(a->acked == 1);
    ready(a, 8, 4, true);
    pump_for(5000); /* longer than a lease: extensions keep what it renders */
    assert_int_equal(test_server_number(&server, "select coalesce(sum(lost), 0) from task"), 0);
    work("kill", 12);
    assert_int_equal(a->stale, 0);
    test_server_audit(&server);
}

static void both_killed_tasks_are_ready_within_a_lease(void **state)
{
    (void)state;
    test_server_submit(&server, "both", 4, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 4, 4);
    UNTIL(a->held_count == 4);
    leave(a);
    stop(SIGKILL);
    int64_t from_ms = now_ms();
    test_server_sql(&server, "update duty set until = now()"); /* its term is 10 s, the lease here only 3 */
    start(NULL);
    UNTIL(test_server_number(&server, "select count(*) from task where state = 0") == 4);
    assert_true(now_ms() - from_ms < 4500); /* lease 3 s, plus the looks of this test on a busy machine */
    struct hand *b = join("b", 1, 4, 4);
    UNTIL(b->held_count == 4);
    work("both", 4);
}

static void results_wait_out_a_database_that_is_away(void **state)
{
    (void)state;
    test_server_submit(&server, "away", 100, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 8, 4);
    UNTIL(a->held_count == 8);
    test_server_control(&server, "stop -m immediate");
    wait_for_file(state_path, "\"away\"");
    result(a, a->held, a->seeds, 8);
    pump_for(4500); /* longer than the leases */
    assert_int_equal(a->acked, 0);
    assert_int_equal(a->batches, 2);
    result(a, a->held, a->seeds, 8); /* repeated, as workers do */
    test_server_control(&server, "start");
    UNTIL(a->acked >= 8);
    work("away", 100);
    assert_int_equal(a->stale, 0);
    assert_true(file_says(log_path, "database_away"));
    assert_true(file_says(log_path, "database_back"));
    assert_int_equal(stop(SIGTERM), 0);
    test_server_audit(&server);
}

static void outage_makes_no_lost_work_of_what_runs(void **state)
{
    (void)state;
    test_server_submit(&server, "outage", 8, NULL);
    start((const char *const[]){"--silent-ms", "2500", NULL}); /* a busy machine may keep the hand from beating */
    struct hand *a = join("a", 1, 8, 4);
    UNTIL(a->held_count == 8);
    control_while_pumping("stop -m fast");
    pump_for(4000); /* leases are 3 s: all ended */
    control_while_pumping("start");
    UNTIL(file_says(state_path, "\"up\""));
    pump_for(4500); /* sweeps come, after extensions */
    assert_int_equal(test_server_number(&server, "select sum(lost) from task"), 0);
    work("outage", 8);
    assert_int_equal(a->stale, 0);
    test_server_audit(&server);
}

static void database_restarts_in_mid_flow(void **state)
{
    (void)state;
    test_server_submit(&server, "flow", 3000, NULL);
    start(NULL);
    join("a", 1, 64, 32);
    join("b", 1, 64, 32);
    for (int i = 0; i < 3; i++) {
        for (int64_t end_ms = now_ms() + 300; now_ms() < end_ms; pump())
            for (int k = 0; k < hand_count; k++)
                if (hands[k].held_count > 0)
                    result(&hands[k], hands[k].held, hands[k].seeds, hands[k].held_count);
        test_server_control(&server, "restart -m immediate");
    }
    work("flow", 3000);
    assert_int_equal(images(), 3000);
    test_server_audit(&server);
}

static void cancel_reaches_the_worker(void **state)
{
    (void)state;
    test_server_submit(&server, "cancel", 12, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 8, 4);
    UNTIL(a->held_count == 8);
    struct task_store *store = NULL;
    struct pg_error why;
    int64_t count = 0;
    assert_true(task_store_open(&store, server.uri, &why));
    assert_true(task_store_cancel(store, "cancel", &count, &why));
    task_store_close(store);
    assert_int_equal(count, 4);
    UNTIL(a->cancelled == 8);
    fail_all(a, MSG_FAILURE_RELEASED, "cancelled");
    UNTIL(a->acked == 8);
    assert_int_equal(a->stale, 0);
    assert_int_equal(test_server_number(&server, "select count(*) from outcome where kind = 'cancelled'"), 12);
    test_server_audit(&server);
}

static void two_coordinators_share_one_database(void **state)
{
    (void)state;
    char second[160], kept[sizeof endpoint];
    test_server_submit(&server, "two", 2000, NULL);
    start(NULL);
    snprintf(second, sizeof second, "ipc://%s/second", dir);
    coordinators[1] = spawn(second, NULL);
    struct hand *a = join("a", 1, 64, 32);
    memcpy(kept, endpoint, sizeof kept);
    memcpy(endpoint, second, sizeof endpoint);
    struct hand *b = join("b", 1, 64, 32);
    memcpy(endpoint, kept, sizeof kept);
    work("two", 2000);
    assert_int_equal(images(), 2000);
    assert_true(a->acked > 0 && b->acked > 0);
    assert_int_equal(a->stale + b->stale, 0);
    UNTIL(test_server_number(&server, "select count(*) from duty") == 1);
    int64_t term = test_server_number(&server, "select term from duty");
    pump_for(1500);
    assert_int_equal(test_server_number(&server, "select term from duty"), term); /* one sweeps, the other does not take it away */
    test_server_audit(&server);
}

static void signal_settles_what_has_arrived(void **state)
{
    (void)state;
    test_server_submit(&server, "stop", 100, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 8, 4);
    UNTIL(a->held_count == 8);
    result(a, a->held, a->seeds, 8);
    usleep(20000);
    assert_int_equal(stop(SIGTERM), 0);
    assert_int_equal(images(), 8);
    /* claimed and sent, or given back: nothing hangs between */
    pump_for(100);
    assert_int_equal(test_server_number(&server, "select count(*) from task where state = 1"), a->held_count);
    test_server_audit(&server);
}

/* A coordinator that stops hears nobody: that its workers are silent then is its own doing. */
static void nobody_is_called_silent_by_a_coordinator_that_stops(void **state)
{
    (void)state;
    int status = -1;
    test_server_submit(&server, "slow", 8, NULL);
    start(NULL);
    struct hand *a = join("a", 1, 8, 8);
    UNTIL(a->held_count == 8);
    pid_t locker = fork();
    if (locker == 0) { /* the commit of the four waits longer than --silent-ms */
        test_server_sql(&server, "do $$ begin lock table task; perform pg_sleep(1.5); end $$");
        _exit(0);
    }
    UNTIL(test_server_number(&server, "select count(*) from pg_stat_activity where wait_event = 'PgSleep'") == 1);
    result(a, a->held, a->seeds, 4);
    pump_for(100);
    kill(coordinators[0], SIGTERM);
    UNTIL(waitpid(locker, &status, WNOHANG) == locker);
    assert_int_equal(ended(coordinators[0]), 0);
    assert_int_equal(images(), 4);
    assert_int_equal(test_server_number(&server, "select count(*) from task where state = 1"), 4);
    assert_false(file_says(log_path, "worker_silent"));
    test_server_audit(&server);
}

static void signal_while_the_database_is_away_ends_at_once(void **state)
{
    (void)state;
    start(NULL);
    test_server_control(&server, "stop -m immediate");
    wait_for_file(state_path, "\"away\"");
    int64_t from_ms = now_ms();
    assert_int_equal(stop(SIGINT), 0);
    assert_true(now_ms() - from_ms < 3000);
    test_server_control(&server, "start");
}

/* --- campaigns ------------------------------------------------------------------------------------------------- */

static void commercial_use_goes_to_no_model_that_forbids_it(void **state)
{
    (void)state;
    test_server_submit(&server, "sold", 4, NULL);
    test_server_sql(&server, "update campaign set use = 'commercial'");
    start(NULL);
    struct hand *a = hand_new("a", 1);
    a->licence = "FLUX Non-Commercial";
    hello(a);
    UNTIL(a->welcomes == 1);
    ready(a, 8, 4, false);
    pump_for(1500);
    assert_int_equal(a->batches, 0);
    struct hand *b = join("b", 1, 8, 4);
    UNTIL(b->held_count == 4);
}

static void higher_priority_goes_first(void **state)
{
    (void)state;
    test_server_submit(&server, "low", 8, NULL);
    test_server_submit(&server, "high", 8, NULL);
    test_server_sql(&server, "update campaign set priority = 5 where name = 'high'");
    start(NULL);
    struct hand *a = join("a", 1, 4, 4);
    UNTIL(a->held_count == 4);
    assert_string_equal(a->campaign, "high");
    result(a, a->held, a->seeds, 4);
    UNTIL(a->batches == 2);
    assert_string_equal(a->campaign, "high");
    UNTIL(a->held_count == 4);
    result(a, a->held, a->seeds, 4);
    UNTIL(a->batches == 3);
    assert_string_equal(a->campaign, "low");
}

/* --- staged files ---------------------------------------------------------------------------------------------- */

static bool is_there(const char *format, ...)
{
    char name[128], path[300];
    va_list list;
    va_start(list, format);
    vsnprintf(name, sizeof name, format, list);
    va_end(list);
    snprintf(path, sizeof path, "%s/%s", out_dir, name);
    return access(path, F_OK) == 0;
}

static void stage(uint64_t task, uint64_t token)
{
    char sha256[65];
    struct store_error why;
    if (!store_dir_stage(out_dir, task, token, "pixels", 6, sha256, &why))
        fail_msg("%s", why.text);
}

static void staged_files_nobody_came_back_for_are_settled(void **state)
{
    (void)state;
    struct store_error why;
    test_server_submit(&server, "staged", 3, NULL);
    test_server_sql(&server, "update campaign set out_dir = '%s'", out_dir);
    assert_true(store_dir_prepare(out_dir, true, &why));
    start((const char *const[]){"--staged-ms", "300", NULL});
    struct hand *a = join("a", 1, 2, 2);
    UNTIL(a->held_count == 2);
    struct msg_held done = a->held[0], open = a->held[1];
    uint64_t seed = a->seeds[0];
    stage(done.task, done.token);       /* committed below: published, as its worker died between */
    stage(open.task, open.token);       /* still rendered by its worker: left */
    stage(open.task, open.token + 7);   /* nobody's: removed */
    result(a, &done, &seed, 1);
    UNTIL(a->acked == 1);
    UNTIL(!is_there(".staging/%" PRIu64 "-%" PRIu64, open.task, open.token + 7));
    UNTIL(!is_there(".staging/%" PRIu64 "-%" PRIu64, done.task, done.token));
    assert_true(is_there("%06" PRIu64 ".png", seed)); /* file and seed are the row's, in test_server_row */
    pump_for(1000);
    assert_true(is_there(".staging/%" PRIu64 "-%" PRIu64, open.task, open.token));
}

/* --- the command line ------------------------------------------------------------------------------------------ */

static int run_once(const char *const *words)
{
    const char *argv[20] = {program};
    pid_t pid;
    posix_spawn_file_actions_t actions;
    for (int i = 0; words[i]; i++)
        argv[1 + i] = words[i];
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 2, log_path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0666);
    assert_int_equal(posix_spawn(&pid, program, &actions, NULL, (char **)(uintptr_t)argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    return ended(pid);
}

static void wrong_words_are_refused_with_a_sentence(void **state)
{
    (void)state;
    static const struct { const char *words[8]; const char *sentence; } cases[] = {
        {{NULL}, "--bind ENDPOINT is missing"},
        {{"--bind", NULL}, "--bind needs a value"},
        {{"--bind", "tcp://0.0.0.0:5555", NULL}, "only this machine may be named"},
        {{"--bind", "ipc:///tmp/x", "--lease-ms", "7x", NULL}, "--lease-ms '7x': want a number from 500"},
        {{"--bind", "ipc:///tmp/x", "--heartbeat-ms", "4000", NULL}, "--silent-ms 5000: at least twice --heartbeat-ms, which is 4000"},
        {{"--bind", "ipc:///tmp/x", "--name", "a b", NULL}, "--name 'a b'"},
        {{"--bind", "ipc:///tmp/x", "--log-level", "loud", NULL}, "--log-level 'loud'"},
        {{"--bind", "ipc:///tmp/x", "extra", NULL}, "unknown word 'extra'"},
        {{"--frobnicate", NULL}, "unknown option '--frobnicate'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(run_once(cases[i].words), 2);
        if (!file_says(log_path, cases[i].sentence))
            fail_msg("not said: %s", cases[i].sentence);
    }
    char long_path[5000]; /* longer than any path may be */
    memset(long_path, 'x', sizeof long_path - 1);
    long_path[sizeof long_path - 1] = '\0';
    const struct { const char *path, *reason; } state_files[] = {{long_path, "File name too long"}, {"/no/such/folder/state", "No such file"}, {dir, "Is a directory"}};
    for (size_t i = 0; i < sizeof state_files / sizeof *state_files; i++) {
        assert_int_equal(run_once((const char *const[]){"--bind", endpoint, "--state-file", state_files[i].path, NULL}), 2);
        if (!file_says(log_path, "cannot write it") || !file_says(log_path, state_files[i].reason))
            fail_msg("not said: %s", state_files[i].reason);
    }
    assert_int_equal(run_once((const char *const[]){"--help", NULL}), 0);
    assert_int_equal(run_once((const char *const[]){"--version", NULL}), 0);
}

static void newer_schema_is_refused_and_an_empty_database_migrated(void **state)
{
    (void)state;
    char uri[300];
    test_server_sql(&server, "insert into schema_version (version, name) values (999, 'from tomorrow')");
    assert_int_equal(run_once((const char *const[]){"--bind", endpoint, "--database", server.uri, NULL}), 2);
    assert_true(file_says(log_path, "999"));
    assert_int_equal(run_once((const char *const[]){"--bind", endpoint, "--database", server.uri, "--migrate", NULL}), 2);
    test_server_sql(&server, "delete from schema_version where version = 999");
    test_server_sql(&server, "create database fresh");
    const char *slash = strstr(server.uri, "/kiln?");
    snprintf(uri, sizeof uri, "%.*s/fresh?%s", (int)(slash - server.uri), server.uri, slash + 6);
    assert_int_equal(run_once((const char *const[]){"--bind", endpoint, "--database", uri, NULL}), 2);
    assert_true(file_says(log_path, "has no kiln tables"));
    unlink(state_path);
    const char *const words[] = {"--database", uri, "--migrate", "--state-file", state_path, NULL};
    coordinators[0] = spawn(endpoint, words);
    wait_for_file(state_path, "\"up\"");
    assert_int_equal(stop(SIGTERM), 0);
}

static int begin(void **state)
{
    (void)state;
    test_server_start(&server);
    snprintf(dir, sizeof dir, "/tmp/kiln-test-coordinator-XXXXXX");
    assert_non_null(mkdtemp(dir));
    snprintf(endpoint, sizeof endpoint, "ipc://%s/socket", dir);
    snprintf(log_path, sizeof log_path, "%s/log", dir);
    snprintf(state_path, sizeof state_path, "%s/state", dir);
    snprintf(out_dir, sizeof out_dir, "%s/out", dir);
    return 0;
}

static int end(void **state)
{
    char command[128];
    (void)state;
    test_server_drop(&server);
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    return system(command);
}

int main(int argc, char **argv)
{
#define STORY(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        STORY(wrong_words_are_refused_with_a_sentence),
        STORY(newer_schema_is_refused_and_an_empty_database_migrated),
        STORY(campaign_ends_with_every_image_once),
        STORY(next_batch_is_there_before_the_last_ends),
        STORY(last_tasks_are_shared),
        STORY(submit_wakes_an_idle_farm),
        STORY(same_result_is_answered_each_time),
        STORY(failures_keep_their_kind),
        STORY(memory_that_ran_out_halves_the_batch),
        STORY(tasks_of_a_vanished_worker_go_to_another_with_a_higher_token),
        STORY(process_that_was_started_again_gives_back_at_once_what_it_lost),
        STORY(second_living_process_of_a_name_is_refused),
        STORY(other_weights_of_the_same_name_are_refused_while_the_first_live),
        STORY(reconnected_worker_goes_on),
        STORY(bye_gives_back_at_once),
        STORY(states_of_workers_are_in_the_database),
        STORY(worker_that_makes_no_step_is_told_of),
        STORY(strangers_are_refused_with_a_sentence),
        STORY(garbage_harms_nobody),
        STORY(coordinator_killed_and_started_again_adopts_what_runs),
        STORY(both_killed_tasks_are_ready_within_a_lease),
        STORY(results_wait_out_a_database_that_is_away),
        STORY(outage_makes_no_lost_work_of_what_runs),
        STORY(database_restarts_in_mid_flow),
        STORY(cancel_reaches_the_worker),
        STORY(two_coordinators_share_one_database),
        STORY(signal_settles_what_has_arrived),
        STORY(nobody_is_called_silent_by_a_coordinator_that_stops),
        STORY(signal_while_the_database_is_away_ends_at_once),
        STORY(commercial_use_goes_to_no_model_that_forbids_it),
        STORY(higher_priority_goes_first),
        STORY(staged_files_nobody_came_back_for_are_settled),
    };
    if (argc < 2) {
        fprintf(stderr, "usage: test_coordinator KILN-COORDINATOR [PATTERN]\n");
        return 2;
    }
    program = argv[1];
    if (argc > 2)
        cmocka_set_test_filter(argv[2]);
    return cmocka_run_group_tests(tests, begin, end);
}
