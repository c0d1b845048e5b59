/* Tests of worker/spool.c. A record that is lost renders an image twice; one that is believed although damaged
 * commits nonsense; one that stops the worker at start needs a person at night. */
#include "spool.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[64], why[1024];

static int make_folder(void **state)
{
    (void)state;
    strcpy(folder, "/tmp/kiln-test-spool-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    char command[256];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

static struct spool_entry *result(uint64_t task, uint64_t token)
{
    struct spool_entry *e = spool_entry_result(task, token, "/out/\xc3\xa4 \"x\"", "f.png");
    memset(e->sha256, 'a', 64);
    memset(e->digest, '0', 64);
    e->bytes = UINT64_C(1) << 60;
    e->seed = UINT64_MAX;
    e->width = 64;
    e->height = 80;
    e->steps = 4;
    e->guidance = 0.1;
    e->render_s = 1.0 / 3;
    e->truncated = true;
    return e;
}

static void open_spool(struct spool *s, int want_bad)
{
    int bad;
    if (!spool_open(s, folder, &bad, why, sizeof why))
        fail_msg("%s", why);
    assert_int_equal(bad, want_bad);
}

static void a_record_survives_the_process(void **state)
{
    (void)state;
    struct spool s;
    struct spool_entry *e = result(UINT64_MAX, 7);
    assert_true(spool_save(folder, e, why, sizeof why));
    assert_true(spool_save(folder, e, why, sizeof why)); /* twice is fine */
    spool_entry_free(e);
    open_spool(&s, 0);
    assert_int_equal(s.count, 1);
    assert_int_equal(s.result_count, 1);
    e = spool_find(&s, UINT64_MAX, 7);
    assert_non_null(e);
    assert_string_equal(e->out_dir, "/out/\xc3\xa4 \"x\"");
    assert_string_equal(e->file, "f.png");
    assert_true(e->bytes == UINT64_C(1) << 60);
    assert_true(e->seed == UINT64_MAX);
    assert_true(e->guidance == 0.1);
    assert_true(e->render_s == 1.0 / 3);
    assert_int_equal(e->height, 80);
    assert_true(e->truncated);
    assert_true(e->is_result);
    assert_null(spool_find(&s, UINT64_MAX, 8));
    assert_true(spool_forget(folder, UINT64_MAX, 7, why, sizeof why));
    assert_true(spool_forget(folder, UINT64_MAX, 7, why, sizeof why));
    spool_done(&s);
    open_spool(&s, 0);
    assert_int_equal(s.count, 0);
    spool_done(&s);
}

static void put_file(const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

static bool has_file(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return access(path, F_OK) == 0;
}

static void damaged_records_are_put_aside_and_half_ones_removed(void **state)
{
    (void)state;
    struct spool s;
    struct spool_entry *e = result(1, 2);
    assert_true(spool_save(folder, e, why, sizeof why));
    spool_entry_free(e);
    put_file("2-3.json", "{\"version\": 1, \"task\"");
    put_file("3-4.json", "{\"version\": 2}");
    put_file("4-5.json", "");
    put_file("5-6.json", "{\"version\": 1, \"task\": \"5\", \"token\": \"99999999999999999999999\", \"out_dir\": \"/o\", \"file\": \"f\"}");
    char path[256];
    snprintf(path, sizeof path, "%s/7-8.json", folder);
    assert_int_equal(mkfifo(path, 0666), 0); /* nobody will ever write into it */
    snprintf(path, sizeof path, "%s/8-9.json", folder);
    assert_int_equal(mkdir(path, 0777), 0);
    put_file("6-7.part", "half");
    put_file("worker.pid", "1");
    open_spool(&s, 6);
    assert_int_equal(s.count, 1);
    assert_true(has_file("7-8.json.bad"));
    assert_true(has_file("8-9.json.bad"));
    assert_true(has_file("2-3.json.bad"));
    assert_true(has_file("5-6.json.bad"));
    assert_false(has_file("6-7.part"));
    assert_true(has_file("worker.pid"));
    spool_done(&s);
    open_spool(&s, 0); /* asked for attention once */
    spool_done(&s);
    assert_true(spool_forget(folder, 1, 2, why, sizeof why));
}

static void a_folder_that_cannot_be_used_is_named(void **state)
{
    (void)state;
    struct spool s;
    int bad;
    char path[256];
    assert_false(spool_open(&s, "/proc/none/x", &bad, why, sizeof why));
    assert_non_null(strstr(why, "/proc/none/x"));
    struct spool_entry *e = result(1, 2);
    snprintf(path, sizeof path, "%s/not-there", folder);
    assert_false(spool_save(path, e, why, sizeof why));
    assert_non_null(strstr(why, "1-2.json"));
    spool_entry_free(e);
    snprintf(path, sizeof path, "%s/deep/er", folder);
    assert_true(spool_prepare(path, why, sizeof why));
    assert_true(has_file("deep/er"));
}

static void what_is_due_is_said_less_and_less_often(void **state)
{
    (void)state;
    struct spool s;
    struct spool_entry *due[4];
    struct failure f = failure_retry("no");
    open_spool(&s, 0);
    spool_add(&s, result(1, 1));
    spool_add(&s, spool_entry_failed(2, 1, &f));
    spool_add(&s, result(3, 1));
    assert_int_equal(s.count, 3);
    assert_int_equal(s.result_count, 2);
    assert_int_equal(spool_due(&s, true, 0, due, 4), 2);
    assert_int_equal(spool_due(&s, true, 0, due, 1), 1);
    assert_int_equal(due[0]->task, 1);
    assert_int_equal(spool_due(&s, false, 0, due, 4), 1);
    assert_int_equal(due[0]->task, 2);
    struct spool_entry *e = spool_find(&s, 1, 1);
    int64_t now_ms = 0, waits[] = {1000, 2000, 4000, 8000, 10000, 10000};
    for (size_t i = 0; i < sizeof waits / sizeof *waits; i++) {
        spool_said(e, now_ms);
        assert_int_equal(e->due_ms - now_ms, waits[i]);
        now_ms = e->due_ms;
    }
    assert_int_equal(spool_due(&s, true, now_ms - 1, due, 4), 1);
    spool_hurry(&s, 5); /* a new session */
    assert_int_equal(spool_due(&s, true, 5, due, 4), 2);
    e->is_settling = true;
    assert_int_equal(spool_due(&s, true, 5, due, 4), 1);
    spool_remove(&s, e);
    spool_entry_free(e);
    e = spool_find(&s, 3, 1);
    spool_remove(&s, e);
    spool_entry_free(e);
    spool_add(&s, result(4, 1)); /* the end of the list is where it should be */
    assert_int_equal(s.count, 2);
    assert_non_null(spool_find(&s, 4, 1));
    spool_done(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_record_survives_the_process),
        cmocka_unit_test(damaged_records_are_put_aside_and_half_ones_removed),
        cmocka_unit_test(a_folder_that_cannot_be_used_is_named),
        cmocka_unit_test(what_is_due_is_said_less_and_less_often),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
