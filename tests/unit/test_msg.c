/* Tests of proto/msg.c. If two releases read one message differently, or a field were lost on the way, an image
 * would be rendered with the wrong seed or its result be taken for another's. */
#include "msg.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct msg there_and_back(const struct msg *m)
{
    uint8_t head[2];
    void *body;
    size_t bytes;
    char why[256] = "";
    struct msg back;
    bool ok = msg_encode(m, head, &body, &bytes, why, sizeof why);
    assert_string_equal(why, ok ? why : "");
    assert_true(ok);
    assert_int_equal(head[0], MSG_VERSION);
    assert_int_equal(head[1], m->kind);
    ok = msg_decode(&back, head, 2, body, bytes, why, sizeof why);
    if (!ok)
        fail_msg("%s", why);
    assert_int_equal(back.kind, m->kind);
    free(body);
    return back;
}

static void assignment_keeps_every_field(void **state)
{
    (void)state;
    struct msg_task tasks[] = {
        {.task = 1, .token = UINT64_MAX, .attempt = 3, .prompt = "ein Fuchs im Schnee \xf0\x9f\xa6\x8a", .negative = "blurry",
         .seed = 0xfedcba9876543210u, .truncate = true, .file = "000012-1f2e3d4c.png", .inputs = "{\"strength\":0.5}"},
        {.task = 2, .token = 1, .prompt = "", .file = "b.png"},
    };
    struct msg m = {.kind = MSG_ASSIGN, .assign = {
        .batch = 9, .lease_ms = 60000, .campaign = "c", .model = "klein", .out_dir = "/data/images/c", .format = "webp",
        .use = "non-commercial", .width = 512, .height = 768, .steps = 0, .guidance = NAN, .count = 2, .tasks = tasks}};
    struct msg back = there_and_back(&m);
    assert_true(back.assign.batch == 9);
    assert_int_equal(back.assign.lease_ms, 60000);
    assert_string_equal(back.assign.campaign, "c");
    assert_string_equal(back.assign.model, "klein");
    assert_string_equal(back.assign.out_dir, "/data/images/c");
    assert_string_equal(back.assign.format, "webp");
    assert_string_equal(back.assign.use, "non-commercial");
    assert_int_equal(back.assign.width, 512);
    assert_int_equal(back.assign.height, 768);
    assert_int_equal(back.assign.steps, 0);
    assert_true(isnan(back.assign.guidance)); /* the model's default must not become a number on the way */
    assert_int_equal(back.assign.count, 2);
    assert_true(back.assign.tasks[0].token == UINT64_MAX);
    assert_int_equal(back.assign.tasks[0].attempt, 3);
    assert_string_equal(back.assign.tasks[0].prompt, tasks[0].prompt);
    assert_string_equal(back.assign.tasks[0].inputs, tasks[0].inputs);
    assert_string_equal(back.assign.tasks[1].inputs, "");
    assert_string_equal(back.assign.tasks[0].negative, "blurry");
    assert_true(back.assign.tasks[0].seed == 0xfedcba9876543210u);
    assert_true(back.assign.tasks[0].truncate);
    assert_string_equal(back.assign.tasks[0].file, "000012-1f2e3d4c.png");
    assert_string_equal(back.assign.tasks[1].negative, "");
    assert_false(back.assign.tasks[1].truncate);
    msg_done(&back);
    msg_done(&back);
}

static void hello_and_its_answers_keep_every_field(void **state)
{
    (void)state;
    struct msg m = {.kind = MSG_HELLO, .hello = {
        .protocol_min = 1, .protocol_max = 3, .software = "kiln 0.1.0", .worker = "w1", .boot_epoch = 1764000000000000u,
        .device = "cpu avx512_bf16, 2 threads", .precision = "bf16", .memory_bytes = 24ull << 30, .host = "h", .pid = 4711,
        .model_count = 2, .models = {{"klein", "ab12", "klein-4b", "Apache-2.0", true}, {"big", "", "klein-9b", "FLUX Non-Commercial", false}}}};
    struct msg back = there_and_back(&m);
    assert_int_equal(back.hello.protocol_max, 3);
    assert_true(back.hello.boot_epoch == 1764000000000000u);
    assert_true(back.hello.memory_bytes == 24ull << 30);
    assert_int_equal(back.hello.pid, 4711);
    assert_int_equal(back.hello.model_count, 2);
    assert_string_equal(back.hello.models[1].licence, "FLUX Non-Commercial");
    assert_true(back.hello.models[0].is_distilled);
    assert_false(back.hello.models[1].is_distilled);
    msg_done(&back);
    m = (struct msg){.kind = MSG_WELCOME, .welcome = {1, "coordinator@h", 1000, 5000}};
    back = there_and_back(&m);
    assert_int_equal(back.welcome.silent_ms, 5000);
    assert_string_equal(back.welcome.coordinator, "coordinator@h");
    msg_done(&back);
    m = (struct msg){.kind = MSG_REFUSED, .refused = {"say hello first", true}};
    back = there_and_back(&m);
    assert_string_equal(back.refused.reason, "say hello first");
    assert_true(back.refused.is_final);
    msg_done(&back);
}

static void words_about_tasks_keep_every_field(void **state)
{
    (void)state;
    struct msg_result_item result = {.task = 5, .token = 6, .sha256 = "00ff", .bytes = 1ull << 40, .width = 64, .height = 80,
        .steps = 4, .guidance = 1.0, .seed = UINT64_MAX, .file = "f.png", .digest = "d", .truncated = true, .render_s = 0.125};
    struct msg m = {.kind = MSG_RESULT, .result = {1, &result}};
    struct msg back = there_and_back(&m);
    const struct msg_result_item *i = &back.result.items[0];
    assert_true(i->task == 5 && i->token == 6 && i->bytes == 1ull << 40 && i->seed == UINT64_MAX);
    assert_true(i->width == 64 && i->height == 80 && i->steps == 4 && i->guidance == 1.0 && i->render_s == 0.125);
    assert_string_equal(i->sha256, "00ff");
    assert_string_equal(i->file, "f.png");
    assert_string_equal(i->digest, "d");
    assert_true(i->truncated);
    msg_done(&back);
    for (int kind = MSG_FAILURE_REFUSE; kind <= MSG_FAILURE_RELEASED; kind++) {
        struct msg_failed_item failed = {7, 8, (enum msg_failure)kind, "too long"};
        m = (struct msg){.kind = MSG_FAILED, .failed = {1, &failed}};
        back = there_and_back(&m);
        assert_int_equal(back.failed.items[0].kind, kind);
        assert_string_equal(back.failed.items[0].reason, "too long");
        msg_done(&back);
    }
    struct msg_ack_item acks[] = {{1, 2, MSG_COMMITTED}, {3, 4, MSG_STALE}};
    m = (struct msg){.kind = MSG_ACK, .ack = {2, acks}};
    back = there_and_back(&m);
    assert_int_equal(back.ack.items[1].verdict, MSG_STALE);
    assert_true(back.ack.items[1].token == 4);
    msg_done(&back);
    uint64_t cancelled[] = {11, 12, 13};
    m = (struct msg){.kind = MSG_CANCEL, .cancel = {3, cancelled, "campaign cancelled"}};
    back = there_and_back(&m);
    assert_memory_equal(back.cancel.tasks, cancelled, sizeof cancelled);
    msg_done(&back);
    m = (struct msg){.kind = MSG_HEARTBEAT, .heartbeat = {99, 4, 2, 0.5, "rendering"}};
    back = there_and_back(&m);
    assert_true(back.heartbeat.step_counter == 99);
    assert_int_equal(back.heartbeat.spooled, 2);
    msg_done(&back);
    m = (struct msg){.kind = MSG_PROGRESS, .progress = {9, 3, 4}};
    back = there_and_back(&m);
    assert_int_equal(back.progress.step, 3);
    msg_done(&back);
    struct msg_held held[] = {{21, 22}};
    m = (struct msg){.kind = MSG_READY, .ready = {8, 4, 1, held}};
    back = there_and_back(&m);
    assert_int_equal(back.ready.credit, 8);
    assert_true(back.ready.held[0].task == 21 && back.ready.held[0].token == 22);
    msg_done(&back);
    m = (struct msg){.kind = MSG_DRAIN};
    back = there_and_back(&m);
    msg_done(&back);
    m = (struct msg){.kind = MSG_BYE, .bye = {"drained"}};
    back = there_and_back(&m);
    assert_string_equal(back.bye.reason, "drained");
    msg_done(&back);
}

static void limits_hold_in_both_directions(void **state)
{
    (void)state;
    char why[256], *prompt = malloc(MSG_PROMPT_MAX + 2);
    memset(prompt, 'a', MSG_PROMPT_MAX + 1);
    prompt[MSG_PROMPT_MAX] = 0;
    struct msg_task *tasks = calloc(MSG_ITEMS_MAX + 1, sizeof *tasks);
    tasks[0].prompt = prompt;
    struct msg m = {.kind = MSG_ASSIGN, .assign = {.count = MSG_ITEMS_MAX, .tasks = tasks}};
    struct msg back = there_and_back(&m);
    assert_int_equal(back.assign.count, MSG_ITEMS_MAX);
    assert_int_equal(strlen(back.assign.tasks[0].prompt), MSG_PROMPT_MAX);
    msg_done(&back);
    uint8_t head[2];
    void *body;
    size_t bytes;
    m.assign.count = MSG_ITEMS_MAX + 1;
    assert_false(msg_encode(&m, head, &body, &bytes, why, sizeof why));
    assert_string_equal(why, "assign: tasks: 1025 items, at most 1024");
    m.assign.count = 1;
    memset(prompt, 'a', MSG_PROMPT_MAX + 1);
    prompt[MSG_PROMPT_MAX + 1] = 0;
    assert_false(msg_encode(&m, head, &body, &bytes, why, sizeof why));
    assert_string_equal(why, "assign: tasks: item 0: prompt: 65537 bytes, at most 65536");
    prompt[MSG_PROMPT_MAX] = 0;
    for (int i = 0; i < MSG_ITEMS_MAX; i++)
        tasks[i].prompt = tasks[i].negative = prompt;
    m.assign.count = MSG_ITEMS_MAX;
    assert_false(msg_encode(&m, head, &body, &bytes, why, sizeof why)); /* 128 MB in one message */
    assert_non_null(strstr(why, "at most 67108864"));
    free(tasks);
    free(prompt);
}

static void heads_that_are_not_ours_are_refused(void **state)
{
    (void)state;
    struct msg m;
    char why[256];
    assert_false(msg_decode(&m, "\x02", 1, "\x80", 1, why, sizeof why));
    assert_non_null(strstr(why, "1 bytes, want 2"));
    assert_false(msg_decode(&m, "\x02\x00", 2, "\x80", 1, why, sizeof why));
    assert_non_null(strstr(why, "kind 0 is unknown"));
    assert_false(msg_decode(&m, "\x02\x0e", 2, "\x80", 1, why, sizeof why));
    assert_false(msg_decode(&m, "\x01\x04", 2, "\x80", 1, why, sizeof why));
    assert_non_null(strstr(why, "protocol version 1"));
    assert_false(msg_decode(&m, "\x02\x04", 2, "\x80", 1, why, sizeof why));
    assert_string_equal(why, "ready: credit is missing");
    assert_false(msg_decode(&m, "\x02\x04", 2, NULL, 0, why, sizeof why));
}

/* Frame 0 of another release: only so can it be told why it is refused. */
static void hello_and_refusal_are_read_across_versions(void **state)
{
    (void)state;
    struct msg m = {.kind = MSG_REFUSED, .refused = {.reason = "protocol 1 is too old", .is_final = true}}, back;
    uint8_t head[2];
    void *body;
    size_t bytes;
    char why[256];
    assert_true(msg_encode(&m, head, &body, &bytes, why, sizeof why));
    head[0] = 7;
    assert_true(msg_decode(&back, head, 2, body, bytes, why, sizeof why));
    assert_string_equal(back.refused.reason, "protocol 1 is too old");
    msg_done(&back);
    free(body);
    /* and without the field that came later */
    assert_true(msg_decode(&back, "\x07\x03", 2, "\x81\xa6reason\xa2no", 11, why, sizeof why));
    assert_string_equal(back.refused.reason, "no");
    assert_false(back.refused.is_final);
    msg_done(&back);
}

static void kinds_and_failures_have_the_words_of_the_log(void **state)
{
    (void)state;
    assert_string_equal(msg_kind_name(MSG_HELLO), "hello");
    assert_string_equal(msg_kind_name(MSG_BYE), "bye");
    assert_string_equal(msg_kind_name((enum msg_kind)0), "unknown");
    assert_string_equal(msg_failure_name(MSG_FAILURE_OOM), "oom");
    assert_string_equal(msg_failure_name(MSG_FAILURE_RELEASED), "released");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(assignment_keeps_every_field),
        cmocka_unit_test(hello_and_its_answers_keep_every_field),
        cmocka_unit_test(words_about_tasks_keep_every_field),
        cmocka_unit_test(limits_hold_in_both_directions),
        cmocka_unit_test(heads_that_are_not_ours_are_refused),
        cmocka_unit_test(hello_and_refusal_are_read_across_versions),
        cmocka_unit_test(kinds_and_failures_have_the_words_of_the_log),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
