/* test_kern_module.c - what is said where no GPU can be used. If this breaks, the first words an operator reads on a new
 * machine are the dynamic loader's, or a module of another version is called with the wrong table. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "kern_module.h"

static void says(const char *device, const char *first, const char *second)
{
    char why[512] = "";
    assert_null(kern_module_open(device, NULL, why, sizeof why));
    if (!strstr(why, first) || !strstr(why, second))
        fail_msg("'%s' has not '%s' and '%s'", why, first, second);
}

static void a_missing_module_is_named_with_what_to_do(void **state)
{
    (void)state;
    setenv("KILN_CUDA_MODULE", "/nonexistent/libkiln-cuda.so", 1);
    says("cuda", "no CUDA device", "/nonexistent/libkiln-cuda.so");
    says("cuda:1", "no CUDA device", "--device cpu");
    char why[512] = "";
    assert_int_equal(kern_module_count(why, sizeof why), 0);
    assert_non_null(strstr(why, "/nonexistent/libkiln-cuda.so"));
    setenv("KILN_DRY_MODULE", "/nonexistent/libkiln-dry.so", 1);
    says("dry:h100", "no dry device", "cmake --preset sim");
    says("dry:h100", "/nonexistent/libkiln-dry.so", "developer's tool");
}

/* The module is looked for beside the program, so a copy of this program runs beside a file that is none. */
static void a_broken_module_beside_the_program_is_named(void **state)
{
    (void)state;
    char command[512], folder[] = "/tmp/kern-module.XXXXXX", why[512] = "";
    unsetenv("KILN_CUDA_MODULE");
    assert_non_null(mkdtemp(folder));
    snprintf(command, sizeof command, "cp /proc/%d/exe %s/program && echo no library >%s/libkiln-cuda.so && %s/program say; rm -r %s",
             (int)getpid(), folder, folder, folder, folder);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    size_t length = fread(why, 1, sizeof why - 1, pipe);
    pclose(pipe);
    char file[64];
    snprintf(file, sizeof file, "%s/libkiln-cuda.so", folder);
    if (!length || !strstr(why, file))
        fail_msg("'%s' does not name %s", why, file);
}

static void a_library_that_is_no_module_of_this_version_is_refused(void **state)
{
    (void)state;
    setenv("KILN_CUDA_MODULE", "libm.so.6", 1);
    says("cuda", "no CUDA device", "version (unknown)");
    setenv("KILN_DRY_MODULE", "libm.so.6", 1);
    says("dry:h100", "no dry device", "version (unknown)");
}

static void names_of_devices_are_checked(void **state)
{
    static const char *const bad[] = {"", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "cuda1", "cuda:64", "cuda: 1", "CUDA"};
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        says(bad[i], bad[i], "accepted: cpu, cuda, cuda:N");
}

/* "say": prints what a program at this place says. */
int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "say") == 0) {
        char why[512] = "";
        kern_module_open("cuda", NULL, why, sizeof why);
        puts(why);
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_missing_module_is_named_with_what_to_do),
        cmocka_unit_test(a_broken_module_beside_the_program_is_named),
        cmocka_unit_test(a_library_that_is_no_module_of_this_version_is_refused),
        cmocka_unit_test(names_of_devices_are_checked),
    };
    return cmocka_run_group_tests_name("kern_module", tests, NULL, NULL);
}
