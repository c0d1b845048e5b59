/* test_sim_count.cpp - bank conflicts and sectors are counted as the programming guide defines them.
 * If this breaks, a slow access pattern passes for a fast one. Expected values: by hand, in each test. */
#include "sim_check.h"

static struct cudasim_access gather(int stride)
{
    struct cudasim_access before = {}, after;
    DeviceArray<float> x(static_cast<size_t>(64 * stride)), y(64);
    cudasim_access_read("gather_kernel", &before);
    must(sim_gather(y.data, x.data, stride, 64, nullptr));
    must(cudaDeviceSynchronize());
    assert_true(cudasim_access_read("gather_kernel", &after));
    after.global_requests -= before.global_requests;
    after.global_sectors -= before.global_sectors;
    after.global_ideal -= before.global_ideal;
    after.read_bytes -= before.read_bytes;
    after.written_bytes -= before.written_bytes;
    return after;
}

static void neighbouring_loads_share_sectors(void **)
{
    /* Two warps; each loads and stores 128 bytes: 4 sectors. */
    struct cudasim_access a = gather(1);
    assert_int_equal(a.global_requests, 4);
    assert_int_equal(a.global_sectors, 16);
    assert_int_equal(a.global_ideal, 16);
    assert_int_equal(a.read_bytes, 256);
    assert_int_equal(a.written_bytes, 256);
}

static void strided_loads_waste_sectors(void **)
{
    /* Stride 8 floats: every load has a sector of its own: 32 for each warp's load, 4 for its store. */
    struct cudasim_access a = gather(8);
    assert_int_equal(a.global_sectors, 2 * (32 + 4));
    assert_int_equal(a.global_ideal, 16);
}

static struct cudasim_access transpose(int padding)
{
    struct cudasim_access before = {}, after;
    DeviceArray<float> x(std::vector<float>(1024, 1.0f)), y(1024);
    cudasim_access_read("transpose_kernel", &before);
    must(sim_transpose(y.data, x.data, padding, nullptr));
    must(cudaDeviceSynchronize());
    assert_true(cudasim_access_read("transpose_kernel", &after));
    after.shared_requests -= before.shared_requests;
    after.shared_wavefronts -= before.shared_wavefronts;
    after.shared_ideal -= before.shared_ideal;
    return after;
}

static void a_column_of_a_32_wide_tile_is_one_bank(void **)
{
    /* 32 rows stored without conflict, 32 columns loaded: each 32 words of one bank. */
    struct cudasim_access a = transpose(0);
    assert_int_equal(a.shared_requests, 64);
    assert_int_equal(a.shared_wavefronts, 32 + 32 * 32);
    assert_int_equal(a.shared_ideal, 64);
}

static void one_float_of_padding_spreads_it_over_all_banks(void **)
{
    struct cudasim_access a = transpose(1);
    assert_int_equal(a.shared_wavefronts, 64);
}

static void swizzled_attention_has_no_conflicts(void **)
{
    struct cudasim_access before = {}, after;
    const int keys = 128;
    DeviceArray<uint16_t> q(sim_numbers_bf16(1, keys * 128)), o(keys * 128);
    cudasim_access_read(NULL, &before);
    must(sim_flash(q.data, q.data, q.data, o.data, 1, keys, keys, false, 0.1f, false, nullptr));
    must(cudaDeviceSynchronize());
    assert_true(cudasim_access_read(NULL, &after));
    assert_true(after.shared_requests - before.shared_requests > 1000);
    assert_int_equal(after.shared_wavefronts - before.shared_wavefronts, after.shared_ideal - before.shared_ideal);
    /* q, k and v are read in whole sectors, and nothing but them and o: two blocks read all keys. */
    assert_int_equal(after.read_bytes - before.read_bytes, (1 + 2 + 2) * keys * 256);
    assert_int_equal(after.written_bytes - before.written_bytes, keys * 256);
    assert_false(cudasim_access_read("no such kernel", &after));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(neighbouring_loads_share_sectors, sim_nothing_left),
        cmocka_unit_test_teardown(strided_loads_waste_sectors, sim_nothing_left),
        cmocka_unit_test_teardown(a_column_of_a_32_wide_tile_is_one_bank, sim_nothing_left),
        cmocka_unit_test_teardown(one_float_of_padding_spreads_it_over_all_banks, sim_nothing_left),
        cmocka_unit_test_teardown(swizzled_attention_has_no_conflicts, sim_nothing_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
