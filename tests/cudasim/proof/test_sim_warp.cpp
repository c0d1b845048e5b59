/* test_sim_warp.cpp - warp collectives move and multiply exactly what the PTX manual says.
 * If this breaks, a kernel with a wrong fragment layout would pass here and fail on a GPU.
 * Expected values: the layouts of the PTX ISA (mma.m16n8k16, mma.m16n8k32, ldmatrix), written out as in gpu.h and
 * computed apart from warp.cpp; shuffles by the CUDA C++ programming guide. */
#include "sim_check.h"

#include <cuda_fp16.h>
#include <cuda_fp8.h>

static float value_of(int kind, uint32_t bits)
{
    if (kind == 0)
        return sim_from_bf16(static_cast<uint16_t>(bits));
    __half_raw raw;
    raw.x = static_cast<unsigned short>(bits);
    if (kind == 2)
        raw = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(bits), __NV_E4M3);
    return __half2float(__half(raw));
}

static uint32_t bits_of(int kind, float x)
{
    if (kind == 0)
        return sim_to_bf16(x);
    if (kind == 2)
        return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
    __half_raw raw = static_cast<__half_raw>(__float2half(x));
    return raw.x;
}

/* put element e of `bits` wide elements into registers: register e / per, its low end first. */
static void put(uint32_t *registers, int index, int bits, uint32_t value)
{
    int per = 32 / bits;
    registers[index / per] |= value << (index % per * bits);
}

static void check_mma(int kind)
{
    const int bits = kind == 2 ? 8 : 16, depth = kind == 2 ? 32 : 16, per = 32 / bits;
    float a[16][32], b[32][8], c[16][8];
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < depth; k++)
            a[i][k] = value_of(kind, bits_of(kind, sim_number(10, static_cast<uint32_t>(i * 32 + k))));
    for (int k = 0; k < depth; k++)
        for (int j = 0; j < 8; j++)
            b[k][j] = value_of(kind, bits_of(kind, sim_number(11, static_cast<uint32_t>(k * 8 + j))));
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++)
            c[i][j] = sim_number(12, static_cast<uint32_t>(i * 8 + j));

    std::vector<uint32_t> ra(32 * 4), rb(32 * 2);
    std::vector<float> rd(32 * 4);
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        for (int e = 0; e < 4 * per; e++) { /* a_e: row g or g + 8, column t * per + e % per, upper half of k from a2 on */
            int row = g + (e / per % 2) * 8, column = t * per + e % per + (e / per / 2) * 4 * per;
            put(&ra[lane * 4], e, bits, bits_of(kind, a[row][column]));
        }
        for (int e = 0; e < 2 * per; e++)
            put(&rb[lane * 2], e, bits, bits_of(kind, b[t * per + e % per + e / per * 4 * per][g]));
        for (int e = 0; e < 4; e++)
            rd[lane * 4 + e] = c[g + e / 2 * 8][t * 2 + e % 2];
    }
    DeviceArray<uint32_t> da(ra), db(rb);
    DeviceArray<float> dd(rd);
    must(sim_mma(dd.data, da.data, db.data, kind, nullptr));
    must(cudaDeviceSynchronize());
    rd = dd.read();
    for (int lane = 0; lane < 32; lane++)
        for (int e = 0; e < 4; e++) {
            int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
            double want = c[row][column];
            for (int k = 0; k < depth; k++)
                want += static_cast<double>(a[row][k]) * b[k][column];
            assert_true(fabs(rd[lane * 4 + e] - want) < 1e-4);
        }
}

static void mma_multiplies_bf16(void **)
{
    check_mma(0);
}

static void mma_multiplies_f16(void **)
{
    check_mma(1);
}

static void mma_multiplies_e4m3(void **)
{
    check_mma(2);
}

static void ldmatrix_gives_each_lane_its_values(void **)
{
    std::vector<uint16_t> rows(32 * 8);
    for (int i = 0; i < 32 * 8; i++)
        rows[i] = static_cast<uint16_t>(i); /* tile, row and column are readable in the value */
    DeviceArray<uint16_t> in(rows);
    for (int tiles : {1, 2, 4})
        for (bool trans : {false, true}) {
            DeviceArray<uint32_t> out(32 * tiles);
            must(sim_ldmatrix(out.data, in.data, tiles, trans, nullptr));
            must(cudaDeviceSynchronize());
            std::vector<uint32_t> r = out.read();
            for (int lane = 0; lane < 32; lane++)
                for (int tile = 0; tile < tiles; tile++)
                    for (int part = 0; part < 2; part++) {
                        int row = lane / 4, column = lane % 4 * 2 + part;
                        int want = tile * 64 + (trans ? column * 8 + row : row * 8 + column);
                        assert_int_equal(r[lane * tiles + tile] >> 16 * part & 0xffff, want);
                    }
        }
}

static void check_collect(enum sim_collective kind, int argument, int (*want)(int lane, int argument))
{
    DeviceArray<int> out(32);
    must(sim_collect(out.data, kind, argument, nullptr));
    must(cudaDeviceSynchronize());
    std::vector<int> r = out.read();
    for (int lane = 0; lane < 32; lane++)
        assert_int_equal(r[lane], want(lane, argument));
}

static void shuffles_read_the_lane_they_name(void **)
{
    check_collect(SIM_SHFL, 5, [](int, int a) { return 100 + a; });
    check_collect(SIM_SHFL, 37, [](int, int a) { return 100 + a % 32; });
    check_collect(SIM_SHFL_UP, 3, [](int lane, int a) { return 100 + (lane < a ? lane : lane - a); });
    check_collect(SIM_SHFL_DOWN, 3, [](int lane, int a) { return 100 + (lane + a > 31 ? lane : lane + a); });
    check_collect(SIM_SHFL_XOR, 9, [](int lane, int a) { return 100 + (lane ^ a); });
    check_collect(SIM_WIDTH_8, 3, [](int lane, int a) { return 100 + lane / 8 * 8 + a; });
}

static void votes_count_every_lane(void **)
{
    check_collect(SIM_BALLOT, 5, [](int, int) { return 31; });
    check_collect(SIM_ANY, 31, [](int, int) { return 1; });
    check_collect(SIM_ANY, 32, [](int, int) { return 0; });
    check_collect(SIM_ALL, 32, [](int, int) { return 1; });
    check_collect(SIM_ALL, 31, [](int, int) { return 0; });
}

static void block_votes_count_every_thread(void **)
{
    DeviceArray<int> out(3);
    const int want[][4] = {{0, 0, 0, 0}, {95, 1, 0, 95}, {96, 1, 1, 96}};
    for (auto &w : want) {
        must(sim_vote_block(out.data, w[0], nullptr));
        must(cudaDeviceSynchronize());
        std::vector<int> r = out.read();
        for (int i = 0; i < 3; i++)
            assert_int_equal(r[i], w[i + 1]);
    }
}

static void atomics_lose_no_update(void **)
{
    DeviceArray<int> x(std::vector<int>{0});
    must(sim_count_threads(x.data, 50, 333, nullptr));
    must(cudaDeviceSynchronize());
    assert_int_equal(x.read()[0], 50 * 333);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(mma_multiplies_bf16, sim_nothing_left),
        cmocka_unit_test_teardown(mma_multiplies_f16, sim_nothing_left),
        cmocka_unit_test_teardown(mma_multiplies_e4m3, sim_nothing_left),
        cmocka_unit_test_teardown(ldmatrix_gives_each_lane_its_values, sim_nothing_left),
        cmocka_unit_test_teardown(shuffles_read_the_lane_they_name, sim_nothing_left),
        cmocka_unit_test_teardown(votes_count_every_lane, sim_nothing_left),
        cmocka_unit_test_teardown(block_votes_count_every_thread, sim_nothing_left),
        cmocka_unit_test_teardown(atomics_lose_no_update, sim_nothing_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
