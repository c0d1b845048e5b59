/* test_janitor.c - what time changes, with a made-up clock. If these break, leases end under working workers, an outage makes
 * lost work of everything, or dead workers keep their tasks. Also the queue of reports, which must neither grow nor lose. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "janitor.h"
#include "report.h"
#include "store_dir.h"

static const struct janitor_options paces = {.lease_ms = 15000, .heartbeat_ms = 1000, .silent_ms = 5000, .stuck_ms = 600000, .staged_ms = 100};
static struct janitor j;
static struct task_extend extends[TASK_STORE_TURN_MAX];

static struct fleet_worker *worker(struct fleet *f, const char *name)
{
    char why[256];
    struct msg_hello h = {.worker = name, .boot_epoch = 1, .device = "cpu", .host = "here"};
    struct fleet_worker *w = fleet_hello(f, &h, name, 0, why, sizeof why);
    assert_non_null(w);
    fleet_move(f, w, FLEET_IDLE);
    return w;
}

static void leases_are_extended_after_a_third_together_with_their_neighbours(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    struct fleet_worker *w = worker(f, "w");
    janitor_init(&j, &paces, NULL, 0);
    for (uint64_t i = 0; i < 10; i++)
        fleet_hold(f, w, i + 1, 1, 1000 + (int64_t)i * 300);
    assert_int_equal(janitor_extend(&j, f, 5999, extends, 1024), 0);
    /* due at 6000; those due within a twelfth of a lease (1250 ms) come along: 1000 1300 1600 1900 2200 */
    assert_int_equal(janitor_extend(&j, f, 6000, extends, 1024), 5);
    assert_int_equal(extends[0].task, 1);
    assert_int_equal(extends[4].task, 5);
    assert_int_equal(janitor_extend(&j, f, 6000, extends, 3), 3); /* as many as fit in a turn */
    for (int i = 0; i < 3; i++)
        fleet_lease_renewed(f, fleet_held_find(f, extends[i].task, 1), 6000);
    assert_int_equal(janitor_extend(&j, f, 6900, extends, 1024), 5);
    assert_int_equal(extends[0].task, 4);
    assert_int_equal(janitor_next_ms(&j, f) <= 6900, true);
    fleet_free(f);
}

static void sweep_waits_for_hellos_and_for_extensions(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    struct fleet_worker *w = worker(f, "w");
    janitor_init(&j, &paces, NULL, 100000);
    assert_false(janitor_may_sweep(&j, f, 100000));
    assert_false(janitor_may_sweep(&j, f, 106999));
    assert_true(janitor_may_sweep(&j, f, 107000)); /* silent_ms and two heartbeats */
    janitor_swept(&j, 107000);
    assert_false(janitor_may_sweep(&j, f, 107999));
    assert_true(janitor_may_sweep(&j, f, 108000));
    struct fleet_held *h = fleet_hold(f, w, 1, 1, 108000);
    assert_true(janitor_may_sweep(&j, f, 109000));
    /* away for a minute */
    janitor_database_back(&j, 170000);
    assert_int_equal(janitor_extend(&j, f, 170000, extends, 1024), 1); /* at once, though it is not its time */
    assert_false(janitor_may_sweep(&j, f, 170000));
    assert_false(janitor_may_sweep(&j, f, 200000)); /* not before it is extended, however long that takes */
    fleet_lease_renewed(f, h, 200000);
    assert_true(janitor_may_sweep(&j, f, 200000));
    fleet_free(f);
}

static void dead_tasks_are_ready_within_the_lease(void **state)
{
    (void)state;
    static const int leases[] = {500, 3000, 15000, 60000, 86400000};
    for (size_t i = 0; i < sizeof leases / sizeof *leases; i++) {
        struct janitor_options o = paces;
        o.lease_ms = leases[i];
        janitor_init(&j, &o, NULL, 0);
        assert_true(janitor_lease_ms(&j) + janitor_sweep_pace_ms(&j) <= leases[i]);
        assert_true(janitor_lease_ms(&j) > leases[i] / 3 + leases[i] / 12); /* extended well before it ends */
    }
}

static void worker_is_silent_after_the_limit_and_forgotten_much_later(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    struct fleet_worker *w = worker(f, "w");
    janitor_init(&j, &paces, NULL, 0);
    fleet_heard(f, w, 1000);
    assert_false(janitor_is_silent(&j, w, 6000));
    assert_true(janitor_is_silent(&j, w, 6001));
    fleet_move(f, w, FLEET_SILENT);
    assert_false(janitor_is_silent(&j, w, 7000)); /* once */
    assert_false(janitor_is_forgotten(w, 600000));
    assert_true(janitor_is_forgotten(w, 1001 + JANITOR_FORGET_MS));
    fleet_free(f);
}

static void stuck_is_who_holds_and_makes_no_step(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    struct fleet_worker *w = worker(f, "w");
    janitor_init(&j, &paces, NULL, 0);
    assert_false(janitor_is_stuck(&j, w, 700000)); /* idle */
    fleet_hold(f, w, 1, 1, 1);
    fleet_review(f, w);
    w->step_ms = 100000;
    assert_false(janitor_is_stuck(&j, w, 700000));
    assert_true(janitor_is_stuck(&j, w, 700001));
    fleet_free(f);
}

static void beats_are_few_and_changes_are_told_soon(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    struct fleet_worker *w = worker(f, "w"), *told[8];
    struct task_beat beats[8];
    assert_int_equal(janitor_beat(f, 10000, beats, told, 8), 1);
    assert_ptr_equal(told[0], w);
    assert_string_equal(beats[0].state, "idle");
    assert_int_equal(janitor_beat(f, 11999, beats, told, 8), 0);
    assert_int_equal(janitor_beat(f, 12000, beats, told, 8), 1);
    fleet_move(f, w, FLEET_BUSY);
    assert_int_equal(janitor_beat(f, 12100, beats, told, 8), 0); /* no flood */
    assert_int_equal(janitor_beat(f, 12250, beats, told, 8), 1);
    assert_string_equal(beats[0].state, "busy");
    snprintf(w->said, sizeof w->said, "blocked: no space in /out");
    fleet_review(f, w);
    assert_int_equal(janitor_beat(f, 13000, beats, told, 8), 1);
    assert_string_equal(beats[0].state, "blocked: no space in /out");
    fleet_move(f, w, FLEET_SILENT);
    assert_int_equal(janitor_beat(f, 14000, beats, told, 8), 1);
    assert_int_equal(janitor_beat(f, 99000, beats, told, 8), 0); /* its row says since when */
    fleet_move(f, w, FLEET_GONE);
    assert_int_equal(janitor_beat(f, 99000, beats, told, 8), 1);
    assert_string_equal(beats[0].state, "gone");
    assert_int_equal(janitor_beat(f, 199000, beats, told, 8), 0);
    for (int i = 0; i < 10; i++) {
        char name[8];
        snprintf(name, sizeof name, "n%d", i);
        worker(f, name);
    }
    assert_int_equal(janitor_beat(f, 199000, beats, told, 8), 8); /* the rest with the next turn */
    assert_int_equal(janitor_beat(f, 199001, beats, told, 8), 2);
    fleet_free(f);
}

static void pings_come_once_a_heartbeat(void **state)
{
    (void)state;
    janitor_init(&j, &paces, NULL, 0);
    assert_true(janitor_pings(&j, 1000));
    assert_false(janitor_pings(&j, 1999));
    assert_true(janitor_pings(&j, 2000));
    assert_true(janitor_pings(&j, 90000));
    assert_false(janitor_pings(&j, 90001));
}

/* --- staged files ---------------------------------------------------------------------------------------------- */

static char folders[3][80];
static int done_count, fault_count;

static void note_done(const char *folder, const struct janitor_disk_file *file, const char *why)
{
    (void)folder;
    (void)file;
    __atomic_fetch_add(why ? &fault_count : &done_count, 1, __ATOMIC_SEQ_CST);
}

static void step_until(enum janitor_round round, int64_t now_ms)
{
    for (int i = 0; i < 5000 && j.round != round; i++) {
        janitor_step(&j, now_ms);
        usleep(1000);
    }
    assert_int_equal(j.round, round);
}

static bool is_there(const char *folder, const char *name)
{
    char path[200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return access(path, F_OK) == 0;
}

static void staged_files_are_settled_folder_by_folder(void **state)
{
    (void)state;
    struct janitor_disk *disk;
    struct store_error error;
    char base[] = "/tmp/kiln-test-janitor-XXXXXX", sha256[65], command[64];
    assert_non_null(mkdtemp(base));
    for (int i = 0; i < 3; i++)
        snprintf(folders[i], sizeof folders[i], "%s/%d", base, i);
    for (int i = 0; i < 3; i += 2) /* the one in the middle is not there: its disk is not mounted */
        assert_true(store_dir_prepare(folders[i], true, &error));
    for (uint64_t task = 1; task <= 300; task++) /* more than one list takes */
        assert_true(store_dir_stage(folders[0], task, 1, "x", 1, sha256, &error));
    assert_true(store_dir_stage(folders[2], 7, 2, "image", 5, sha256, &error));
    assert_true(store_dir_stage(folders[2], 8, 2, "image", 5, sha256, &error));
    assert_true(janitor_disk_open(&disk, 0, note_done));
    janitor_init(&j, &paces, disk, 0);
    step_until(JANITOR_NEEDS_FOLDERS, 100000);
    const char *names[] = {folders[0], folders[1], folders[2]};
    assert_true(janitor_take_folders(&j, names, 3));
    for (int round = 0; round < 2; round++) { /* all stale, in two lists */
        char verdicts[JANITOR_DISK_FILES_MAX];
        const char *none[JANITOR_DISK_FILES_MAX] = {NULL};
        step_until(JANITOR_NEEDS_VERDICTS, 100000);
        assert_int_equal(j.file_count, round == 0 ? JANITOR_DISK_FILES_MAX : 300 - JANITOR_DISK_FILES_MAX);
        memset(verdicts, 's', sizeof verdicts);
        janitor_take_verdicts(&j, verdicts, none);
    }
    step_until(JANITOR_NEEDS_VERDICTS, 100000);
    assert_int_equal(j.file_count, 2);
    bool is_seven_first = j.asked[0].task == 7;
    const char *files[2] = {NULL, NULL};
    files[is_seven_first ? 0 : 1] = "seven.png";
    janitor_take_verdicts(&j, is_seven_first ? "cr" : "rc", files);
    step_until(JANITOR_RESTS, 100000);
    assert_true(is_there(folders[2], "seven.png"));
    assert_false(is_there(folders[2], ".staging/7-2"));
    assert_true(is_there(folders[2], ".staging/8-2"));
    assert_false(is_there(folders[0], ".staging/1-1"));
    assert_int_equal(done_count, 301);
    assert_int_equal(fault_count, 0);
    janitor_step(&j, 100050);
    assert_int_equal(j.round, JANITOR_RESTS);
    janitor_step(&j, 100100);
    assert_int_equal(j.round, JANITOR_NEEDS_FOLDERS);
    assert_true(janitor_take_folders(&j, NULL, 0));
    step_until(JANITOR_RESTS, 100200);
    janitor_disk_close(disk);
    janitor_disk_close(NULL);
    janitor_done(&j);
    snprintf(command, sizeof command, "rm -rf %s", base);
    assert_int_equal(system(command), 0);
}

/* --- reports --------------------------------------------------------------------------------------------------- */

static void full_queue_takes_no_more_and_loses_nothing(void **state)
{
    (void)state;
    struct fleet *f = fleet_new();
    struct fleet_worker *w = worker(f, "w");
    struct report_queue q;
    struct msg_result_item item = {.token = 1, .sha256 = "s", .digest = "d", .width = UINT32_MAX, .bytes = 1};
    assert_true(report_open(&q));
    uint64_t next = 1, taken = 1;
    for (int round = 0; round < 3; round++) { /* around the ring */
        for (;; next++) {
            struct fleet_held *h = fleet_hold(f, w, next, 1, 0);
            item.task = next;
            if (!report_result(&q, h, &item)) {
                assert_false(h->is_reported); /* it will be said again */
                fleet_drop(f, h);
                break;
            }
        }
        assert_int_equal(q.result_count, REPORT_QUEUE_MAX);
        assert_int_equal(w->pins, REPORT_QUEUE_MAX);
        for (int i = 0; i < 1000; i++) {
            struct report_result *r = report_result_at(&q, i);
            assert_int_equal(r->finish.task, taken++);
            assert_int_equal(r->finish.width, 0); /* no image is so wide: the database says stale */
            w->pins--;
            fleet_drop(f, r->held);
        }
        report_answered(&q, 1000, 0);
    }
    report_close(&q);
    fleet_free(f);
}

static void task_that_is_still_held_is_not_given_back(void **state)
{
    (void)state;
    struct report_queue q;
    assert_true(report_open(&q));
    for (uint64_t i = 1; i <= 3; i++)
        assert_true(report_give_back(&q, i, 5, TASK_LOST, "silent"));
    report_forgive(&q, 1, 1, 5); /* in the running turn already: too late */
    report_forgive(&q, 1, 2, 4); /* another token */
    report_forgive(&q, 1, 3, 5);
    assert_int_equal(report_failure_at(&q, 0)->fail.task, 1);
    assert_int_equal(report_failure_at(&q, 1)->fail.task, 2);
    assert_int_equal(report_failure_at(&q, 2)->fail.task, 0);
    report_answered(&q, 0, 1);
    assert_int_equal(q.failure_count, 2);
    while (report_give_back(&q, 9, 9, TASK_LOST, "silent"))
        ;
    assert_int_equal(q.failure_count, REPORT_QUEUE_MAX);
    report_close(&q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(leases_are_extended_after_a_third_together_with_their_neighbours),
        cmocka_unit_test(sweep_waits_for_hellos_and_for_extensions),
        cmocka_unit_test(dead_tasks_are_ready_within_the_lease),
        cmocka_unit_test(worker_is_silent_after_the_limit_and_forgotten_much_later),
        cmocka_unit_test(stuck_is_who_holds_and_makes_no_step),
        cmocka_unit_test(beats_are_few_and_changes_are_told_soon),
        cmocka_unit_test(pings_come_once_a_heartbeat),
        cmocka_unit_test(staged_files_are_settled_folder_by_folder),
        cmocka_unit_test(full_queue_takes_no_more_and_loses_nothing),
        cmocka_unit_test(task_that_is_still_held_is_not_given_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
