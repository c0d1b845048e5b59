/* test_kern_cpu.c - the CPU backend itself: arena, errors, choice of instruction set, threads.
 * If this breaks, a worker out of memory crashes instead of halving its batch. */
#include "kernel_check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void the_arena_gives_aligned_memory_and_takes_it_back(struct kernel_check *c)
{
    size_t start = kern_mark(c->k), before = kern_peak_bytes(c->k);
    struct tensor a = kern_temp(c->k, c->dtype, 2, (int64_t[]){3, 5}), b = kern_temp(c->k, c->dtype, 1, (int64_t[]){1});
    assert_int_equal((uintptr_t)a.data % 64, 0);
    assert_int_equal((uintptr_t)b.data % 64, 0);
    assert_true((char *)b.data >= (char *)a.data + tensor_bytes(a));
    kernel_check_fill(a, 1, 1);
    size_t mark = kern_mark(c->k);
    struct tensor big = kern_temp(c->k, c->dtype, 2, (int64_t[]){1000, 1000}); /* grows */
    memset(big.data, 1, tensor_bytes(big));
    size_t peak = kern_peak_bytes(c->k);
    assert_true(peak >= before + tensor_bytes(big));
    kern_rewind(c->k, mark);
    struct tensor again = kern_temp(c->k, c->dtype, 2, (int64_t[]){1000, 1000});
    assert_ptr_equal(again.data, big.data); /* a second pass over a shape allocates nothing */
    assert_int_equal(kern_peak_bytes(c->k), peak);
    kern_rewind(c->k, start);
    assert_int_equal(kern_mark(c->k), start);
    struct tensor first = kern_temp(c->k, c->dtype, 2, (int64_t[]){3, 5});
    assert_ptr_equal(first.data, a.data);
}

static void add_one(void *context)
{
    ++*(int *)context;
}

static void work_for_a_graph_is_done_once(struct kernel_check *c)
{
    int count = 0;
    kern_graph(c->k, add_one, &count);
    assert_int_equal(count, 1);
}

static void an_op_leaves_the_arena_as_it_found_it(struct kernel_check *c)
{
    struct tensor w = kernel_check_random(c, 2, (int64_t[]){30, 40}, 1, 1), x = kernel_check_random(c, 2, (int64_t[]){9, 40}, 2, 1);
    struct tensor out = kernel_check_tensor(c, c->dtype, 2, (int64_t[]){9, 30});
    size_t mark = kern_mark(c->k), peak = kern_peak_bytes(c->k);
    struct kern_weight *packed = kern_weight_linear(c->k, c->dtype, w, (struct tensor){0});
    assert_int_equal(kern_peak_bytes(c->k), peak + kern_weight_bytes(packed));
    kern_linear(c->k, out, x, packed);
    assert_int_equal(kern_mark(c->k), mark);
    kern_weight_free(c->k, packed);
}

static void no_memory_is_a_sentence_and_not_a_crash(struct kernel_check *c)
{
    struct tensor x = kernel_check_random(c, 2, (int64_t[]){4, 4}, 1, 1), out = kernel_check_tensor(c, c->dtype, 2, x.shape);
    struct tensor before = kernel_check_strided(c, out, 0);
    assert_true(kern_sync(c->k));
    assert_string_equal(kern_error(c->k), "");
    struct tensor huge = kern_temp(c->k, c->dtype, 1, (int64_t[]){INT64_C(1) << 50});
    assert_null(huge.data);
    assert_false(kern_sync(c->k));
    assert_memory_equal(kern_error(c->k), "no memory", 9); /* the engine knows the fault by this beginning */
    char text[256];
    snprintf(text, sizeof text, "%s", kern_error(c->k));
    kern_silu(c->k, out, x); /* later ops do nothing */
    kern_copy(c->k, huge, huge);
    assert_memory_equal(out.data, before.data, tensor_bytes(out));
    assert_null(kern_weight_linear(c->k, c->dtype, x, (struct tensor){0}));
    assert_null(kern_temp(c->k, c->dtype, 1, (int64_t[]){4}).data);
    kern_temp(c->k, c->dtype, 1, (int64_t[]){INT64_C(1) << 51});
    assert_string_equal(kern_error(c->k), text); /* the first error stays */
}

static void after_no_memory_smaller_work_may_be_tried(struct kernel_check *c)
{
    struct tensor x = kernel_check_random(c, 1, (int64_t[]){9}, 1, 1), out = kernel_check_tensor(c, c->dtype, 1, x.shape);
    assert_true(kern_recover(c->k)); /* nothing to forget */
    kern_temp(c->k, c->dtype, 1, (int64_t[]){INT64_C(1) << 50});
    assert_true(kern_error_is_memory(kern_error(c->k)));
    assert_true(kern_recover(c->k));
    kern_copy(c->k, out, x);
    kernel_check_done(c->k);
    kernel_check_same_bits(out, x);
}

/* A model's vectors are the backend's, so that its file may go; their bytes count until they are given back. */
static void uploaded_vectors_are_converted_and_counted(struct kernel_check *c)
{
    for (int d = 0; d < 2; d++) {
        size_t before = kern_peak_bytes(c->k);
        struct tensor host = kernel_check_tensor(c, d ? TENSOR_F32 : TENSOR_BF16, 1, (int64_t[]){70});
        kernel_check_fill(host, 3, 2);
        struct tensor t = kern_upload(c->k, c->dtype, host);
        assert_int_equal(t.dtype, c->dtype);
        assert_int_equal(kern_peak_bytes(c->k), before + tensor_bytes(t));
        for (int64_t i = 0; i < 70; i++)
            assert_true(kernel_check_get(t, i) == kernel_check_round(c->dtype, kernel_check_get(host, i)));
        kern_release(c->k, t);
        assert_int_equal(kern_peak_bytes(c->k), before);
    }
}

static void the_name_says_what_runs(struct kernel_check *c)
{
    char want[64];
    snprintf(want, sizeof want, "cpu %s, 2 threads", c->isa);
    assert_string_equal(kern_name(c->k), want);
    snprintf(want, sizeof want, "cpu %s, 1 thread", c->isa);
    assert_string_equal(kern_name(c->one), want);
}

static void what_cannot_be_had_is_refused(struct kernel_check *c)
{
    (void)c;
    char why[256];
    assert_null(kern_cpu_open(&(struct kern_cpu_options){.threads = 1, .isa = "mmx"}, why, sizeof why));
    assert_string_equal(why, "instruction set 'mmx' is not one of amx, avx512_bf16, avx512, avx2, portable");
    assert_null(kern_cpu_open(&(struct kern_cpu_options){.threads = 257}, why, sizeof why));
    assert_string_equal(why, "threads: 257, accepted: 1 to 256");
    assert_null(kern_cpu_open(&(struct kern_cpu_options){.threads = -1}, why, sizeof why));
    assert_int_equal(setenv("KILN_ISA", "portable", 1), 0);
    struct kern *k = kern_cpu_open(&(struct kern_cpu_options){.threads = 1}, why, sizeof why);
    assert_int_equal(unsetenv("KILN_ISA"), 0);
    assert_non_null(k);
    assert_string_equal(kern_name(k), "cpu portable, 1 thread");
    kern_close(k);
    kern_close(NULL);
}

int main(void)
{
    static const struct kernel_check_test tests[] = {
        KERNEL_CHECK_TEST(the_arena_gives_aligned_memory_and_takes_it_back),
        KERNEL_CHECK_TEST(work_for_a_graph_is_done_once),
        KERNEL_CHECK_TEST(an_op_leaves_the_arena_as_it_found_it),
        KERNEL_CHECK_TEST(no_memory_is_a_sentence_and_not_a_crash),
        KERNEL_CHECK_TEST(after_no_memory_smaller_work_may_be_tried),
        KERNEL_CHECK_TEST(uploaded_vectors_are_converted_and_counted),
        KERNEL_CHECK_TEST(the_name_says_what_runs),
        KERNEL_CHECK_TEST(what_cannot_be_had_is_refused),
    };
    return kernel_check_main(tests, sizeof tests / sizeof *tests);
}
