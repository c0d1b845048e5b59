/* Tests of worker/batch.c and mailbox.c: what the threads share. A cap that is forgotten makes every batch fail once; a
 * mailbox that loses an item loses an image. */
#include "batch.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static void caps_are_learnt_for_each_shape(void **state)
{
    (void)state;
    struct batch_caps c = {.most = 16};
    assert_int_equal(batch_caps_of(&c, "m", 512, 512), 16);
    assert_int_equal(batch_caps_lower(&c, "m", 512, 512, 16), 8);
    assert_int_equal(batch_caps_lower(&c, "m", 512, 512, 3), 1); /* a batch of 3 did not fit */
    assert_int_equal(batch_caps_lower(&c, "m", 512, 512, 1), 1);
    assert_int_equal(batch_caps_of(&c, "m", 512, 512), 1);
    assert_int_equal(batch_caps_of(&c, "m", 512, 768), 16);
    assert_int_equal(batch_caps_of(&c, "n", 512, 512), 16);
    assert_int_equal(batch_caps_lower(&c, "n", 512, 512, 64), 16); /* never raised */
}

static void a_full_table_of_caps_forgets_the_oldest(void **state)
{
    (void)state;
    struct batch_caps c = {.most = 4};
    for (uint32_t i = 0; i < BATCH_CAPS_MAX + 1; i++)
        batch_caps_lower(&c, "m", 64 + i, 64, 2);
    assert_int_equal(c.count, BATCH_CAPS_MAX);
    assert_int_equal(batch_caps_of(&c, "m", 64, 64), 4);
    assert_int_equal(batch_caps_of(&c, "m", 65, 64), 1);
    assert_int_equal(batch_caps_of(&c, "m", 64 + BATCH_CAPS_MAX, 64), 1);
}

static struct batch *batch_of(uint32_t count)
{
    struct msg_task tasks[8] = {0};
    struct msg m = {.kind = MSG_ASSIGN, .assign = {.count = count, .tasks = tasks}}, copy;
    uint8_t head[2];
    void *body;
    size_t bytes;
    char why[256];
    for (uint32_t i = 0; i < count; i++)
        tasks[i].task = i + 1;
    assert_true(msg_encode(&m, head, &body, &bytes, why, sizeof why));
    assert_true(msg_decode(&copy, head, 2, body, bytes, why, sizeof why));
    free(body);
    struct batch *b = batch_new(&copy, 7);
    assert_null(copy.block); /* the batch has it now */
    return b;
}

static void a_batch_waits_for_its_tasks_and_for_the_painter(void **state)
{
    (void)state;
    struct batch *b = batch_of(3);
    assert_int_equal(b->open, 4);
    assert_int_equal(b->session, 7);
    assert_false(batch_is_cancelled(b, 1));
    atomic_store(&b->tasks[1].is_cancelled, true);
    assert_true(batch_is_cancelled(b, 1));
    assert_false(batch_is_cancelled(b, 2));
    struct failure f = failure_released("cancelled");
    f.is_last = true;
    struct batch_outcome *o = batch_outcome_failed(b, 1, &f);
    assert_int_equal(o->entry->task, 2);
    assert_string_equal(o->entry->reason, "cancelled");
    assert_true(o->is_last);
    batch_outcome_free(o);
    batch_free(b);
}

struct item { struct mail mail; int number; };

static void *put_thousand(void *box)
{
    for (int i = 0; i < 1000; i++) {
        struct item *item = calloc(1, sizeof *item);
        item->number = i;
        mailbox_put(box, &item->mail);
    }
    mailbox_close(box);
    return NULL;
}

static void a_mailbox_keeps_order_and_loses_nothing(void **state)
{
    (void)state;
    struct mailbox box;
    pthread_t thread;
    assert_true(mailbox_init(&box, true));
    assert_null(mailbox_wait(&box, 10));
    assert_int_equal(pthread_create(&thread, NULL, put_thousand, &box), 0);
    int next = 0;
    for (struct item *item; (item = mailbox_wait(&box, -1)); next++) {
        assert_int_equal(item->number, next);
        free(item);
    }
    assert_int_equal(next, 1000);
    assert_true(mailbox_is_closed(&box));
    pthread_join(thread, NULL);
    uint64_t count;
    assert_int_equal(read(box.event_fd, &count, sizeof count), sizeof count);
    mailbox_wake(&box);
    mailbox_calm(&box);
    assert_int_equal(read(box.event_fd, &count, sizeof count), -1);
    mailbox_done(&box);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(caps_are_learnt_for_each_shape),
        cmocka_unit_test(a_full_table_of_caps_forgets_the_oldest),
        cmocka_unit_test(a_batch_waits_for_its_tasks_and_for_the_painter),
        cmocka_unit_test(a_mailbox_keeps_order_and_loses_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
