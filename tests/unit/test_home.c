/* test_home.c - the folder kiln lives in: where it is, who owns it, what the last `kiln up` said.
 * If this breaks, two commands talk to two databases, or somebody else's folder is written to. */
#include "home.h"

#include "up_plan.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[] = "/tmp/kiln-test-home.XXXXXX";
static char why[8192];

static struct home in_folder(const char *name)
{
    struct home home;
    char path[300];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (!home_open(&home, path, why, sizeof why))
        fail_msg("%s", why);
    return home;
}

static void clear_environment(void)
{
    static const char *const names[] = {"PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE", "KILN_HOME", "XDG_DATA_HOME"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        unsetenv(names[i]);
}

/* --- where -------------------------------------------------------------------------------------------------- */

static void home_is_found_in_the_documented_order(void **state)
{
    (void)state;
    struct home home;
    clear_environment();
    assert_true(home_open(&home, NULL, why, sizeof why));
    if (geteuid() == 0)
        assert_string_equal(home.dir, "/var/lib/kiln");
    setenv("KILN_HOME", "/tmp/kiln-a", 1);
    assert_true(home_open(&home, NULL, why, sizeof why));
    assert_string_equal(home.dir, "/tmp/kiln-a");
    assert_true(home_open(&home, "/tmp/kiln-b", why, sizeof why));
    assert_string_equal(home.dir, "/tmp/kiln-b");
    clear_environment();
}

static void spellings_of_one_home_are_one_home(void **state)
{
    (void)state;
    char path[300], link[300], cwd[4096];
    struct home home, again;
    snprintf(path, sizeof path, "%s/real", folder);
    snprintf(link, sizeof link, "%s/link", folder);
    assert_int_equal(mkdir(path, 0755), 0);
    assert_int_equal(symlink(path, link), 0);
    assert_true(home_open(&home, path, why, sizeof why));
    assert_true(home_open(&again, link, why, sizeof why));
    assert_string_equal(home.dir, again.dir);
    snprintf(path, sizeof path, "%s/link/not/yet/", folder); /* what does not exist is kept as it is */
    assert_true(home_open(&again, path, why, sizeof why));
    assert_true(strncmp(again.dir, home.dir, strlen(home.dir)) == 0);
    assert_string_equal(again.dir + strlen(home.dir), "/not/yet");
    assert_non_null(getcwd(cwd, sizeof cwd));
    assert_int_equal(chdir(folder), 0);
    assert_true(home_open(&again, "real", why, sizeof why));
    assert_string_equal(home.dir, again.dir);
    assert_int_equal(chdir(cwd), 0);
}

static void home_must_fit_into_a_socket_address(void **state)
{
    (void)state;
    struct home home;
    char path[HOME_DIR_MAX + 8], socket[HOME_PATH_MAX];
    memset(path, 'a', sizeof path);
    path[0] = '/';
    path[HOME_DIR_MAX] = 0;
    assert_true(home_open(&home, path, why, sizeof why));
    home_path(&home, socket, sizeof socket, "run/.s.PGSQL.5432");
    assert_int_equal(strlen(socket), HOME_SOCKET_MAX);
    path[HOME_DIR_MAX] = 'a';
    path[HOME_DIR_MAX + 1] = 0;
    assert_false(home_open(&home, path, why, sizeof why));
    assert_non_null(strstr(why, "at most 89"));
    assert_false(home_open(&home, "", why, sizeof why));
    assert_false(home_open(&home, "/tmp/a\nb", why, sizeof why));
    assert_non_null(strstr(why, "0x0a"));
    assert_false(home_open(&home, "/tmp/a,b", why, sizeof why)); /* two hosts, libpq would think */
}

/* --- making --------------------------------------------------------------------------------------------------- */

static mode_t mode_of(const struct home *home, const char *name)
{
    char path[HOME_PATH_MAX];
    struct stat info;
    home_path(home, path, sizeof path, name);
    assert_int_equal(stat(path, &info), 0);
    return info.st_mode & 07777;
}

static void folders_are_made_once_and_closed_to_others(void **state)
{
    (void)state;
    struct home home = in_folder("deep/er/home");
    for (int i = 0; i < 2; i++) {
        if (!home_create(&home, (unsigned)-1, (unsigned)-1, why, sizeof why))
            fail_msg("%s", why);
        assert_int_equal(mode_of(&home, "postgres"), 0700);
        assert_int_equal(mode_of(&home, "run"), 0700);
        assert_int_equal(mode_of(&home, "spool"), 0700);
        char path[HOME_PATH_MAX];
        home_path(&home, path, sizeof path, "run");
        assert_int_equal(chmod(path, 0777), 0); /* somebody opened it: the next start closes it */
    }
}

static void server_of_another_user_may_put_its_socket_there(void **state)
{
    (void)state;
    if (geteuid() != 0)
        skip();
    struct home home = in_folder("of-root");
    assert_true(home_create(&home, 65534, 65534, why, sizeof why));
    char path[HOME_PATH_MAX];
    struct stat info;
    home_path(&home, path, sizeof path, "postgres");
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(info.st_uid, 65534);
    assert_int_equal(mode_of(&home, "postgres"), 0700);
    home_path(&home, path, sizeof path, "run");
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(info.st_uid, 0);
    assert_int_equal(info.st_gid, 65534);
    assert_int_equal(mode_of(&home, "run"), 01770); /* sticky: our pid files are not the server's to remove */
}

static void what_is_no_home_of_ours_is_refused(void **state)
{
    (void)state;
    char path[300];
    snprintf(path, sizeof path, "%s/file", folder);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fclose(f);
    struct home home = in_folder("file");
    assert_false(home_create(&home, (unsigned)-1, (unsigned)-1, why, sizeof why));
    assert_non_null(strstr(why, "is not a folder"));
    snprintf(path, sizeof path, "%s/file/below", folder);
    assert_false(home_open(&home, path, why, sizeof why));
    assert_non_null(strstr(why, "Not a directory"));
    home = (struct home){.dir = "/proc/kiln"};
    assert_false(home_create(&home, (unsigned)-1, (unsigned)-1, why, sizeof why));
    assert_non_null(strstr(why, "/proc/kiln"));
    if (geteuid() != 0)
        return;
    snprintf(path, sizeof path, "%s/theirs", folder);
    assert_int_equal(mkdir(path, 0777), 0);
    assert_int_equal(chown(path, 65534, 65534), 0);
    home = in_folder("theirs");
    assert_false(home_create(&home, (unsigned)-1, (unsigned)-1, why, sizeof why));
    assert_non_null(strstr(why, "belongs to user"));
}

/* --- the database --------------------------------------------------------------------------------------------- */

static void option_then_environment_then_last_up_then_private(void **state)
{
    (void)state;
    static struct home_config config;
    char uri[HOME_PATH_MAX], private_uri[HOME_PATH_MAX];
    struct home home = in_folder("db");
    clear_environment();
    assert_true(home_create(&home, (unsigned)-1, (unsigned)-1, why, sizeof why));
    home_private_uri(&home, private_uri, sizeof private_uri);
    assert_true(home_database(&home, NULL, uri, sizeof uri, why, sizeof why));
    assert_string_equal(uri, private_uri);
    snprintf(config.database, sizeof config.database, "postgresql://db.example/kiln");
    assert_true(home_config_write(&home, &config, why, sizeof why));
    assert_true(home_database(&home, NULL, uri, sizeof uri, why, sizeof why));
    assert_string_equal(uri, "postgresql://db.example/kiln");
    setenv("PGSERVICE", "farm", 1);
    assert_true(home_database(&home, NULL, uri, sizeof uri, why, sizeof why));
    assert_string_equal(uri, "");
    assert_true(home_database(&home, "postgresql:///x", uri, sizeof uri, why, sizeof why));
    assert_string_equal(uri, "postgresql:///x");
    config.database[0] = 0; /* the last `kiln up` used an environment ... */
    assert_true(home_config_write(&home, &config, why, sizeof why));
    unsetenv("PGSERVICE"); /* ... that is not here: another database would be silently wrong */
    assert_false(home_database(&home, NULL, uri, sizeof uri, why, sizeof why));
    assert_non_null(strstr(why, "PGHOST"));
    assert_false(home_database(&home, "", uri, sizeof uri, why, sizeof why));
}

static void private_uri_keeps_odd_characters_of_the_path(void **state)
{
    (void)state;
    char uri[HOME_PATH_MAX];
    struct home home = {.dir = "/tmp/a b%c&d=\xc3\xbc"};
    home_private_uri(&home, uri, sizeof uri);
    assert_string_equal(uri, "postgresql:///kiln?host=/tmp/a%20b%25c%26d%3D%C3%BC/run&port=5432&user=kiln");
}

/* --- kiln.json ------------------------------------------------------------------------------------------------ */

static void config_comes_back_as_it_was_written(void **state)
{
    (void)state;
    static struct home_config config, again;
    struct home home = in_folder("config");
    struct home_model *models = NULL;
    bool is_found = true;
    int count = -1;
    assert_true(home_config_read(&home, &again, &is_found, why, sizeof why)); /* there is no home at all */
    assert_false(is_found);
    assert_true(home_models(&home, &models, &count, why, sizeof why));
    assert_true(count == 0 && !models);
    assert_true(home_create(&home, (unsigned)-1, (unsigned)-1, why, sizeof why));
    config = (struct home_config){.workers = 2, .threads = 3, .batch = 4, .model_count = HOME_MODELS_MAX};
    snprintf(config.endpoint, sizeof config.endpoint, "ipc:///x");
    for (int i = 0; i < HOME_MODELS_MAX; i++) {
        snprintf(config.models[i].name, sizeof config.models[i].name, "m%d", i);
        snprintf(config.models[i].dir, sizeof config.models[i].dir, "/models/\"%d\"\\", i);
    }
    assert_true(home_config_write(&home, &config, why, sizeof why));
    assert_true(home_config_read(&home, &again, &is_found, why, sizeof why));
    assert_true(is_found);
    assert_memory_equal(&config, &again, sizeof config);
    assert_true(home_models(&home, &models, &count, why, sizeof why));
    assert_int_equal(count, HOME_MODELS_MAX);
    assert_string_equal(models[63].name, "m63");
    free(models);
    snprintf(config.models[0].dir, sizeof config.models[0].dir, "/models/\xff");
    assert_false(home_config_write(&home, &config, why, sizeof why));
    assert_non_null(strstr(why, "UTF-8"));
    assert_true(home_config_read(&home, &again, &is_found, why, sizeof why)); /* the old one is still there */
    assert_true(is_found);
}

static void damaged_config_is_a_sentence_with_a_remedy(void **state)
{
    (void)state;
    static const char *const bad[] = {
        "", "{", "[]", "\"x\"", "{}", "{\"endpoint\":3}",
        "{\"endpoint\":\"\",\"database\":\"\",\"device\":\"\",\"precision\":\"\",\"workers\":1,\"threads\":1,\"batch\":1}",
        "{\"endpoint\":\"\",\"database\":\"\",\"device\":\"\",\"precision\":\"\",\"workers\":-1,\"threads\":1,\"batch\":1,\"models\":[]}",
        "{\"endpoint\":\"\",\"database\":\"\",\"device\":\"\",\"precision\":\"0123456789abcdef\",\"workers\":1,\"threads\":1,\"batch\":1,\"models\":[]}",
        "{\"endpoint\":\"\",\"database\":\"\",\"device\":\"\",\"precision\":\"\",\"workers\":1,\"threads\":1,\"batch\":1,\"models\":[{}]}",
    };
    static struct home_config config;
    struct home home = in_folder("damaged");
    char path[HOME_PATH_MAX];
    bool is_found;
    assert_true(home_create(&home, (unsigned)-1, (unsigned)-1, why, sizeof why));
    home_path(&home, path, sizeof path, "run/kiln.json");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        FILE *f = fopen(path, "w");
        assert_non_null(f);
        fputs(bad[i], f);
        fclose(f);
        if (home_config_read(&home, &config, &is_found, why, sizeof why))
            fail_msg("accepted: %s", bad[i]);
        assert_false(is_found);
        assert_non_null(strstr(why, "is damaged"));
        assert_non_null(strstr(why, "remove it"));
    }
}

/* --- words of `kiln up` ----------------------------------------------------------------------------------------- */

static void models_are_a_name_and_a_folder(void **state)
{
    (void)state;
    static struct home_model model;
    char text[600];
    snprintf(text, sizeof text, "FLUX.2-klein_4B=%s", folder);
    assert_true(up_plan_model(&model, text, why, sizeof why));
    assert_string_equal(model.name, "FLUX.2-klein_4B");
    snprintf(text, sizeof text, "a=b=%s", folder); /* the folder 'b=/tmp/...' is not there */
    assert_false(up_plan_model(&model, text, why, sizeof why));
    static const char *const bad[] = {"", "x", "=", "=/tmp", "x=", "a/b=/tmp", ".x=/tmp", "a b=/tmp", "\xc3\xbc=/tmp", "x=/nowhere/at/all",
                                      "x=/etc/passwd"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        why[0] = 0;
        if (up_plan_model(&model, bad[i], why, sizeof why))
            fail_msg("'%s' was accepted", bad[i]);
        if (!strstr(why, bad[i]))
            fail_msg("'%s' does not name %s", why, bad[i]);
    }
}

/* Names of workers on a database that others use too. */
static void names_differ_by_home_and_database_and_stay_the_same(void **state)
{
    (void)state;
    const struct home one = {.dir = "/a"}, two = {.dir = "/b"};
    char first[160], again[160];
    clear_environment();
    up_plan_tag(first, sizeof first, &one, "postgresql://x/kiln");
    up_plan_tag(again, sizeof again, &one, "postgresql://x/kiln");
    assert_string_equal(first, again);
    up_plan_tag(again, sizeof again, &two, "postgresql://x/kiln");
    assert_string_not_equal(first, again);
    up_plan_tag(again, sizeof again, &one, "postgresql://y/kiln");
    assert_string_not_equal(first, again);
    up_plan_tag(first, sizeof first, &one, "");
    setenv("PGHOST", "db", 1);
    up_plan_tag(again, sizeof again, &one, "");
    assert_string_not_equal(first, again);
    clear_environment();
    assert_true(strspn(first, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") == strlen(first));
}

static void tools_are_found_beside_the_program_or_in_path(void **state)
{
    (void)state;
    char path[HOME_PATH_MAX];
    assert_true(home_tool("test_home", path, sizeof path, why, sizeof why));
    assert_int_equal(access(path, X_OK), 0);
    assert_true(home_tool("sh", path, sizeof path, why, sizeof why));
    assert_false(home_tool("kiln-no-such-tool", path, sizeof path, why, sizeof why));
    assert_non_null(strstr(why, "kiln-no-such-tool"));
}

static int start(void **state)
{
    (void)state;
    return mkdtemp(folder) && chmod(folder, 0755) == 0 ? 0 : -1;
}

static int stop(void **state)
{
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(home_is_found_in_the_documented_order),
        cmocka_unit_test(spellings_of_one_home_are_one_home),
        cmocka_unit_test(home_must_fit_into_a_socket_address),
        cmocka_unit_test(folders_are_made_once_and_closed_to_others),
        cmocka_unit_test(server_of_another_user_may_put_its_socket_there),
        cmocka_unit_test(what_is_no_home_of_ours_is_refused),
        cmocka_unit_test(option_then_environment_then_last_up_then_private),
        cmocka_unit_test(private_uri_keeps_odd_characters_of_the_path),
        cmocka_unit_test(config_comes_back_as_it_was_written),
        cmocka_unit_test(damaged_config_is_a_sentence_with_a_remedy),
        cmocka_unit_test(models_are_a_name_and_a_folder),
        cmocka_unit_test(names_differ_by_home_and_database_and_stay_the_same),
        cmocka_unit_test(tools_are_found_beside_the_program_or_in_path),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
