/* test_store_dir.c - a folder where a file is official or not there.
 * If this breaks, images are overwritten, half-written files look finished, or a full disk fails tasks for good. */
#include "store_dir.h"

#include <dirent.h>
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[] = "/tmp/kiln-test-store.XXXXXX";
static struct store_error why;

static const char *path_of(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void put(const char *name, const char *text)
{
    FILE *f = fopen(path_of(name), "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

static const char *content(const char *name)
{
    static char text[256];
    FILE *f = fopen(path_of(name), "r");
    if (!f)
        return NULL;
    text[fread(text, 1, sizeof text - 1, f)] = 0;
    fclose(f);
    return text;
}

static int set_up(void **state)
{
    (void)state;
    strcpy(strrchr(folder, '.') + 1, "XXXXXX");
    if (!mkdtemp(folder))
        return -1;
    why = (struct store_error){0};
    return store_dir_prepare(folder, false, &why) ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    char command[600];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    return system(command);
}

static void staged_file_becomes_official_once_published(void **state)
{
    (void)state;
    char sha256[65];
    assert_true(store_dir_stage(folder, 17, 3, "abc", 3, sha256, &why));
    assert_string_equal(sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_string_equal(content(".staging/17-3"), "abc");
    assert_null(content("a.png"));
    assert_true(store_dir_publish(folder, 17, 3, "a.png", &why));
    assert_string_equal(content("a.png"), "abc");
    assert_null(content(".staging/17-3"));
}

/* A crash anywhere between makes every step run again. */
static void every_step_may_run_twice(void **state)
{
    (void)state;
    char sha256[65];
    assert_true(store_dir_prepare(folder, true, &why));
    assert_true(store_dir_stage(folder, 1, 1, "first try", 9, sha256, &why));
    assert_true(store_dir_stage(folder, 1, 1, "abc", 3, sha256, &why));
    assert_true(store_dir_publish(folder, 1, 1, "a.png", &why));
    assert_true(store_dir_publish(folder, 1, 1, "a.png", &why)); /* staging gone, file there */
    assert_true(store_dir_stage(folder, 1, 1, "abc", 3, sha256, &why));
    assert_true(store_dir_publish(folder, 1, 1, "a.png", &why)); /* both there, same content */
    assert_null(content(".staging/1-1"));
    assert_string_equal(content("a.png"), "abc");
    assert_true(store_dir_stage(folder, 1, 2, "x", 1, sha256, &why));
    assert_true(store_dir_discard(folder, 1, 2, &why));
    assert_true(store_dir_discard(folder, 1, 2, &why));
    assert_null(content(".staging/1-2"));
}

static void another_file_of_that_name_is_never_replaced(void **state)
{
    (void)state;
    char sha256[65];
    put("a.png", "precious");
    assert_true(store_dir_stage(folder, 1, 1, "abc", 3, sha256, &why));
    assert_false(store_dir_publish(folder, 1, 1, "a.png", &why));
    assert_int_equal(why.fault, STORE_EXISTS);
    assert_non_null(strstr(why.text, "a.png"));
    assert_string_equal(content("a.png"), "precious");
    assert_string_equal(content(".staging/1-1"), "abc");
    /* same length, other content */
    put("b.png", "abd");
    assert_false(store_dir_publish(folder, 1, 1, "b.png", &why));
    assert_int_equal(why.fault, STORE_EXISTS);
}

/* Where links publish (NFS), a crash leaves one file under both names: staging again must not write into it. */
static void staging_again_leaves_a_linked_official_file_alone(void **state)
{
    (void)state;
    char sha256[65], staged[512];
    assert_true(store_dir_stage(folder, 1, 1, "abc", 3, sha256, &why));
    snprintf(staged, sizeof staged, "%s", path_of(".staging/1-1"));
    assert_int_equal(link(staged, path_of("a.png")), 0);
    assert_true(store_dir_stage(folder, 1, 1, "other", 5, sha256, &why));
    assert_string_equal(content("a.png"), "abc");
}

static void nothing_staged_and_nothing_published_is_missing(void **state)
{
    (void)state;
    assert_false(store_dir_publish(folder, 9, 9, "a.png", &why));
    assert_int_equal(why.fault, STORE_MISSING);
}

static void names_that_leave_the_folder_are_refused(void **state)
{
    (void)state;
    static const char *const bad[] = {"", ".", "..", ".hidden", "a/b", "../x", "a\nb", "a\x7f"};
    char sha256[65];
    assert_true(store_dir_stage(folder, 1, 1, "abc", 3, sha256, &why));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_false(store_dir_file_ok(bad[i]));
        assert_false(store_dir_publish(folder, 1, 1, bad[i], &why));
    }
    char longest[300];
    memset(longest, 'a', sizeof longest);
    longest[255] = 0;
    assert_true(store_dir_file_ok(longest));
    longest[255] = 'a';
    longest[256] = 0;
    assert_false(store_dir_file_ok(longest));
    assert_true(store_dir_file_ok("000012-01-0a1b2c3d.png"));
    assert_true(store_dir_file_ok("Füchse.png"));
}

struct seen {
    int count;
    uint64_t task_sum, token_sum;
    double oldest_s;
};

static bool see(void *context, uint64_t task, uint64_t token, double age_s)
{
    struct seen *s = context;
    s->count++;
    s->task_sum += task;
    s->token_sum += token;
    if (age_s > s->oldest_s)
        s->oldest_s = age_s;
    return true;
}

static void staged_files_are_listed_and_strangers_are_not(void **state)
{
    (void)state;
    char sha256[65];
    struct seen seen = {0};
    assert_true(store_dir_stage(folder, 10, 1, "a", 1, sha256, &why));
    assert_true(store_dir_stage(folder, UINT64_MAX - 10, 2, "b", 1, sha256, &why));
    static const char *const strangers[] = {"notes.txt", "1-", "-1", "1-2-3", "01-2", "+1-2", "1-2.png", "18446744073709551616-1"};
    for (size_t i = 0; i < sizeof strangers / sizeof *strangers; i++) {
        char name[64];
        snprintf(name, sizeof name, ".staging/%s", strangers[i]);
        put(name, "x");
    }
    assert_true(store_dir_staged(folder, see, &seen, &why));
    assert_int_equal(seen.count, 2);
    assert_true(seen.task_sum == UINT64_MAX && seen.token_sum == 3);
    assert_true(seen.oldest_s >= 0 && seen.oldest_s < 60);
    char none[512];
    snprintf(none, sizeof none, "%s", path_of("none"));
    assert_int_equal(mkdir(none, 0777), 0);
    assert_true(store_dir_staged(none, see, &seen, &why)); /* nothing was ever staged */
    assert_int_equal(seen.count, 2);
    assert_false(store_dir_staged(path_of("absent"), see, &seen, &why));
    assert_int_equal(why.fault, STORE_MISSING);
}

static void faults_of_folders_are_told_apart(void **state)
{
    (void)state;
    char sha256[65], deep[512], file[512];
    snprintf(deep, sizeof deep, "%s/x/y/z", folder);
    assert_false(store_dir_prepare(deep, false, &why));
    assert_int_equal(why.fault, STORE_MISSING);
    assert_non_null(strstr(why.text, deep));
    assert_false(store_dir_stage(deep, 1, 1, "a", 1, sha256, &why));
    assert_int_equal(why.fault, STORE_MISSING);
    assert_true(store_dir_prepare(deep, true, &why));
    assert_true(store_dir_stage(deep, 1, 1, "a", 1, sha256, &why));
    put("file", "x");
    snprintf(file, sizeof file, "%s/file", folder);
    assert_false(store_dir_prepare(file, false, &why));
    assert_int_equal(why.fault, STORE_MISSING);
    assert_false(store_dir_prepare("/proc/kiln", true, &why));
    assert_true(why.fault != STORE_OK && why.text[0]);
}

static void a_folder_of_somebody_else_is_denied(void **state)
{
    (void)state;
    assert_int_equal(chmod(folder, 0555), 0);
    int code = -1;
    pid_t child = fork();
    if (child == 0) { /* root may write anywhere: ask as nobody */
        if (geteuid() == 0 && (setgid(65534) != 0 || setuid(65534) != 0))
            _exit(9);
        _exit(!store_dir_prepare(folder, false, &why) && why.fault == STORE_DENIED ? 0 : 1);
    }
    assert_int_equal(waitpid(child, &code, 0), child);
    assert_int_equal(code, 0);
    assert_int_equal(chmod(folder, 0755), 0);
}

/* The disk that fills up: needs a mount of its own, which only root may make. */
static void full_and_read_only_disks_stop_the_work_and_leave_nothing_behind(void **state)
{
    (void)state;
    char disk[512], sha256[65];
    snprintf(disk, sizeof disk, "%s", path_of("disk"));
    assert_int_equal(mkdir(disk, 0777), 0);
    if (mount("kiln-test", disk, "tmpfs", 0, "size=256k") != 0) {
        print_message("skipped: cannot mount a small tmpfs (%s)\n", strerror(errno));
        skip();
    }
    enum { BIG = 1 << 20 };
    char *big = calloc(1, BIG);
    bool prepared = store_dir_prepare(disk, false, &why);
    bool full = !store_dir_stage(disk, 1, 1, big, BIG, sha256, &why) && why.fault == STORE_FULL;
    struct seen seen = {0};
    struct store_error other;
    bool listed = store_dir_staged(disk, see, &seen, &other);
    bool fits = store_dir_stage(disk, 1, 1, big, 1000, sha256, &other);
    bool remounted = mount(NULL, disk, NULL, MS_REMOUNT | MS_RDONLY, NULL) == 0;
    struct store_error closed = {0}, prepare = {0};
    bool staged = store_dir_stage(disk, 1, 2, big, 1000, sha256, &closed);
    bool published = store_dir_publish(disk, 1, 1, "a.png", &other);
    bool prepared_again = store_dir_prepare(disk, true, &prepare);
    umount2(disk, MNT_DETACH);
    free(big);
    assert_true(prepared);
    assert_true(full);
    assert_non_null(strstr(why.text, "No space left"));
    assert_true(listed);
    assert_int_equal(seen.count, 0);
    assert_true(fits);
    assert_true(remounted);
    assert_false(staged);
    assert_int_equal(closed.fault, STORE_READ_ONLY);
    assert_false(published);
    assert_int_equal(other.fault, STORE_READ_ONLY);
    assert_false(prepared_again);
    assert_int_equal(prepare.fault, STORE_READ_ONLY);
}

static void file_names_say_row_variation_and_key(void **state)
{
    (void)state;
    static const uint8_t key[16] = {0x0a, 0x1b, 0x2c, 0x3d, 0xff};
    char name[256];
    store_dir_file_name(name, sizeof name, NULL, 12, 0, 1, key, "png");
    assert_string_equal(name, "000012-0a1b2c3d.png");
    store_dir_file_name(name, sizeof name, "", 12, 1, 4, key, "jpg");
    assert_string_equal(name, "000012-01-0a1b2c3d.jpg");
    store_dir_file_name(name, sizeof name, "fox", 12, 0, 1, key, "webp");
    assert_string_equal(name, "fox-0a1b2c3d.webp");
    store_dir_file_name(name, sizeof name, "fox", 12, 3, 4, key, "png");
    assert_string_equal(name, "fox-03-0a1b2c3d.png");
    store_dir_file_name(name, sizeof name, NULL, 12345678, 0, 1, key, "png");
    assert_string_equal(name, "12345678-0a1b2c3d.png");
}

int main(void)
{
#define WITH_FOLDER(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        WITH_FOLDER(staged_file_becomes_official_once_published),
        WITH_FOLDER(every_step_may_run_twice),
        WITH_FOLDER(another_file_of_that_name_is_never_replaced),
        WITH_FOLDER(staging_again_leaves_a_linked_official_file_alone),
        WITH_FOLDER(nothing_staged_and_nothing_published_is_missing),
        WITH_FOLDER(names_that_leave_the_folder_are_refused),
        WITH_FOLDER(staged_files_are_listed_and_strangers_are_not),
        WITH_FOLDER(faults_of_folders_are_told_apart),
        WITH_FOLDER(a_folder_of_somebody_else_is_denied),
        WITH_FOLDER(full_and_read_only_disks_stop_the_work_and_leave_nothing_behind),
        cmocka_unit_test(file_names_say_row_variation_and_key),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
