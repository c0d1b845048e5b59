/* bench_kernels.c - kernels against what the machine can give, measured in the same seconds.
 *
 * Prints JSON lines {"name","value","unit","limit","ratio"}. The limit of a figure is the peak of its multiply
 * instruction (tdpbf16ps when the kernels use AMX, else vdpbf16ps, or f32 FMA) on all threads, with independent accumulators. Kernel and peak take turns; the
 * best of each counts, because whatever else runs on the machine only ever makes a turn slower.
 *
 * On a GPU (--device) the limit is what its vendor publishes, as the options say, and a turn lasts until the device is done. */
#include <getopt.h>
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kern.h"
#include "kern_cpu.h"
#include "kern_module.h"

static int threads = 0, turns = 5, shrink = 1;
static const char *device;         /* NULL: the CPU */
static double published_gflops[2]; /* of the device, by is-f32; 0: not known */
static bool is_amx; /* the kernels have it: the process may use it */

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- peak --------------------------------------------------------------------------------------- */

#define PEAK_ROUNDS 500000

__attribute__((target("avx512f"))) static void *peak_f32_512(void *sink)
{
    __m512 c[20], a = _mm512_set1_ps(1.0001f), b = _mm512_set1_ps(1e-9f);
    for (int i = 0; i < 20; i++)
        c[i] = _mm512_set1_ps((float)i);
    for (int r = 0; r < PEAK_ROUNDS; r++) {
#pragma GCC unroll 20
        for (int i = 0; i < 20; i++)
            c[i] = _mm512_fmadd_ps(a, b, c[i]);
    }
    for (int i = 1; i < 20; i++)
        c[0] = _mm512_add_ps(c[0], c[i]);
    *(float *)sink = _mm512_reduce_add_ps(c[0]);
    return NULL;
}

__attribute__((target("avx512f,avx512bf16"))) static void *peak_bf16_512(void *sink)
{
    __m512 c[20];
    __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80), b = (__m512bh)_mm512_set1_epi32(0x30003000);
    for (int i = 0; i < 20; i++)
        c[i] = _mm512_set1_ps((float)i);
    for (int r = 0; r < PEAK_ROUNDS; r++) {
#pragma GCC unroll 20
        for (int i = 0; i < 20; i++)
            c[i] = _mm512_dpbf16_ps(c[i], a, b);
    }
    for (int i = 1; i < 20; i++)
        c[0] = _mm512_add_ps(c[0], c[i]);
    *(float *)sink = _mm512_reduce_add_ps(c[0]);
    return NULL;
}

__attribute__((target("avx2,fma"))) static void *peak_f32_256(void *sink)
{
    __m256 c[10], a = _mm256_set1_ps(1.0001f), b = _mm256_set1_ps(1e-9f);
    for (int i = 0; i < 10; i++)
        c[i] = _mm256_set1_ps((float)i);
    for (int r = 0; r < 2 * PEAK_ROUNDS; r++) {
#pragma GCC unroll 10
        for (int i = 0; i < 10; i++)
            c[i] = _mm256_fmadd_ps(a, b, c[i]);
    }
    for (int i = 1; i < 10; i++)
        c[0] = _mm256_add_ps(c[0], c[i]);
    *(float *)sink = c[0][0];
    return NULL;
}

__attribute__((target("amx-tile,amx-bf16"))) static void *peak_bf16_amx(void *sink)
{
    static const struct {
        uint8_t palette, start, zero[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    float sum[256];
    _tile_loadconfig(&shape); /* all tiles are zeros now */
    for (int r = 0; r < PEAK_ROUNDS; r++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sum, 64);
    _tile_release();
    *(float *)sink = sum[0];
    return NULL;
}

struct peak {
    void *(*run)(void *);
    int index;
    float sink;
};

/* Each on a core of its own from the start: a peak is over before the system has spread new threads. */
static void *peak_main(void *context)
{
    struct peak *p = context;
    cpu_set_t all, one;
    sched_getaffinity(0, sizeof all, &all);
    int left = p->index % CPU_COUNT(&all), core = 0;
    while (!CPU_ISSET(core, &all) || left-- > 0)
        core++;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    sched_setaffinity(0, sizeof one, &one);
    return p->run(&p->sink);
}

static double peak_gflops(enum tensor_dtype dtype)
{
    void *(*run)(void *) = peak_f32_256;
    double flops = 2.0 * PEAK_ROUNDS * 10 * 8 * 2;
    if (__builtin_cpu_supports("avx512f")) {
        run = peak_f32_512;
        flops = (double)PEAK_ROUNDS * 20 * 16 * 2;
    }
    if (dtype == TENSOR_BF16 && __builtin_cpu_supports("avx512bf16")) {
        run = peak_bf16_512;
        flops = (double)PEAK_ROUNDS * 20 * 32 * 2;
    }
    if (dtype == TENSOR_BF16 && is_amx) {
        run = peak_bf16_amx;
        flops = (double)PEAK_ROUNDS * 4 * 16 * 16 * 32 * 2;
    }
    pthread_t helper[256];
    struct peak peaks[256];
    double start = now_s();
    for (int i = 0; i < threads; i++) {
        peaks[i] = (struct peak){run, i, 0};
        pthread_create(&helper[i], NULL, peak_main, &peaks[i]);
    }
    for (int i = 0; i < threads; i++)
        pthread_join(helper[i], NULL);
    return flops * threads / (now_s() - start) / 1e9;
}

/* --- figures -------------------------------------------------------------------------------------- */

/* On the host; the caller frees data. */
static struct tensor random_values(enum tensor_dtype dtype, int rank, const int64_t *shape)
{
    struct tensor t = tensor_of(NULL, dtype, rank, shape);
    const int64_t count = tensor_count(t);
    t.data = malloc(tensor_bytes(t));
    if (!t.data) {
        fprintf(stderr, "bench_kernels: no memory for %lld values\n", (long long)count);
        exit(1);
    }
    uint32_t state = 1;
    for (int64_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        float v = (float)(int32_t)state * (1.0f / 2147483648.0f);
        if (dtype == TENSOR_F32)
            ((float *)t.data)[i] = v;
        else
            ((uint16_t *)t.data)[i] = tensor_bf16_of(v);
    }
    return t;
}

static struct tensor random_tensor(struct kern *k, enum tensor_dtype dtype, int rank, const int64_t *shape)
{
    struct tensor values = random_values(dtype, rank, shape), t = kern_temp(k, dtype, rank, shape);
    kern_write(k, t, values);
    kern_sync(k);
    free(values.data);
    return t;
}

static void report(const char *name, double gflops, double peak)
{
    printf("{\"name\":\"%s\",\"value\":%.1f,\"unit\":\"GFLOP/s\",", name, gflops);
    if (peak > 0)
        printf("\"limit\":%.1f,\"ratio\":%.3f}\n", peak, gflops / peak);
    else
        printf("\"limit\":null,\"ratio\":null}\n");
    fflush(stdout);
}

struct turn {
    struct kern *k;
    enum tensor_dtype dtype;
    struct tensor out, x, key, value;
    const struct kern_weight *w;
};

static void measure(const char *name, void (*run)(struct turn *), struct turn *turn, double flops)
{
    double best_s = 1e30, peak = 0;
    for (int i = 0; i < turns; i++) {
        double now_peak = device ? published_gflops[turn->dtype == TENSOR_F32] : peak_gflops(turn->dtype), start = now_s();
        run(turn);
        kern_sync(turn->k);
        double taken_s = now_s() - start;
        best_s = taken_s < best_s ? taken_s : best_s;
        peak = now_peak > peak ? now_peak : peak;
    }
    report(name, flops / best_s / 1e9, peak);
}

static void run_linear(struct turn *t)
{
    kern_linear(t->k, t->out, t->x, t->w);
}

static void bench_linear(struct kern *k, enum tensor_dtype dtype, int64_t m, int64_t n, int64_t width)
{
    size_t mark = kern_mark(k);
    struct turn t = {.k = k, .dtype = dtype};
    t.x = random_tensor(k, dtype, 2, (int64_t[]){m, width});
    t.out = kern_temp(k, dtype, 2, (int64_t[]){m, n});
    struct tensor source = random_values(dtype, 2, (int64_t[]){n, width});
    double start = now_s();
    struct kern_weight *w = kern_weight_linear(k, dtype, source, (struct tensor){0});
    double packing = (double)tensor_bytes(source) / (now_s() - start) / 1e9;
    t.w = w;
    char name[96];
    snprintf(name, sizeof name, "gemm %s m=%ld n=%ld k=%ld", tensor_dtype_name(dtype), (long)m, (long)n, (long)width);
    measure(name, run_linear, &t, 2.0 * (double)m * (double)n * (double)width);
    if (m == 768 && n == 27648 && !device)
        printf("{\"name\":\"pack %s\",\"value\":%.2f,\"unit\":\"GB/s\",\"limit\":null,\"ratio\":null}\n",
               tensor_dtype_name(dtype), packing);
    kern_weight_free(k, w);
    free(source.data);
    kern_rewind(k, mark);
}

/* Bytes that are finite in every format: scales are f16 or e4m3 numbers of bytes up to 0x37. */
static struct quant_matrix random_matrix(enum quant_format format, int64_t n, int64_t width)
{
    struct quant_matrix m = {.format = format, .n = n, .k = width, .scale = 1.0f / 512, .is_swizzled = true};
    size_t bytes = 0, scales = 0;
    quant_bytes(&bytes, format, n, width);
    quant_block_scale_bytes(&scales, &m);
    uint8_t *data = malloc(bytes + scales);
    uint32_t state = 1;
    for (size_t i = 0; data && i < bytes + scales; i++) {
        state = state * 1664525u + 1013904223u;
        data[i] = (uint8_t)((state >> 24) % 0x38);
    }
    m.data = data;
    m.block_scales = data + bytes;
    return m;
}

/* A weight as a file has it: the figure is to be compared with that of gemm at the same shape. */
static void bench_quant(struct kern *k, enum quant_format format, int64_t m, int64_t n, int64_t width)
{
    size_t mark = kern_mark(k);
    struct turn t = {.k = k, .dtype = TENSOR_BF16};
    t.x = random_tensor(k, TENSOR_BF16, 2, (int64_t[]){m, width});
    t.out = kern_temp(k, TENSOR_BF16, 2, (int64_t[]){m, n});
    struct quant_matrix matrix = random_matrix(format, n, width);
    struct kern_weight *w = matrix.data ? kern_weight_quant(k, TENSOR_BF16, &(struct quant_run){matrix, 0, n}, 1) : NULL;
    t.w = w;
    char name[96];
    snprintf(name, sizeof name, "gemm %s m=%ld n=%ld k=%ld", quant_info(format)->name, (long)m, (long)n, (long)width);
    if (w)
        measure(name, run_linear, &t, 2.0 * (double)m * (double)n * (double)width);
    kern_weight_free(k, w);
    free((void *)(uintptr_t)matrix.data);
    kern_rewind(k, mark);
}

static void run_attention(struct turn *t)
{
    kern_attention(t->k, t->out, t->x, t->key, t->value, 0.0883883f, (struct kern_mask){0});
}

static void bench_attention(struct kern *k, enum tensor_dtype dtype, int64_t rows, int64_t heads, int64_t d)
{
    size_t mark = kern_mark(k);
    const int64_t shape[] = {1, rows, heads, d};
    struct turn t = {.k = k, .dtype = dtype};
    t.x = random_tensor(k, dtype, 4, shape), t.key = random_tensor(k, dtype, 4, shape);
    t.value = random_tensor(k, dtype, 4, shape), t.out = kern_temp(k, dtype, 4, shape);
    char name[96];
    snprintf(name, sizeof name, "attention %s rows=%ld heads=%ld d=%ld", tensor_dtype_name(dtype), (long)rows,
             (long)heads, (long)d);
    measure(name, run_attention, &t, 4.0 * (double)rows * (double)rows * (double)(heads * d));
    kern_rewind(k, mark);
}

static void run_conv(struct turn *t)
{
    kern_conv2d(t->k, t->out, t->x, t->w, 1, 1);
}

static void bench_conv(struct kern *k, enum tensor_dtype dtype, int64_t side, int64_t in, int64_t n)
{
    size_t mark = kern_mark(k);
    struct turn t = {.k = k, .dtype = dtype};
    t.x = random_tensor(k, dtype, 4, (int64_t[]){1, side, side, in});
    t.out = kern_temp(k, dtype, 4, (int64_t[]){1, side, side, n});
    struct tensor source = random_values(dtype, 4, (int64_t[]){n, in, 3, 3});
    struct kern_weight *w = kern_weight_conv(k, dtype, source, (struct tensor){0});
    t.w = w;
    char name[96];
    snprintf(name, sizeof name, "conv3x3 %s %ldx%ld in=%ld out=%ld", tensor_dtype_name(dtype), (long)side, (long)side,
             (long)in, (long)n);
    measure(name, run_conv, &t, 2.0 * (double)(side * side) * 9.0 * (double)in * (double)n);
    kern_weight_free(k, w);
    free(source.data);
    kern_rewind(k, mark);
}

static void usage(FILE *to)
{
    fputs("usage: bench_kernels [--threads N] [--isa NAME] [--turns N] [gemm|quant|attention|conv]...\n"
          "       bench_kernels --device cuda|cuda:N [--peaks BF16,F32] [--shrink N] [--turns N] [gemm|quant|attention|conv]...\n"
          "  GFLOP/s of the kernels at FLUX.2 klein-4B shapes, beside the peak measured in the same seconds\n"
          "  --peaks B,F   of the GPU, as its vendor publishes them, in TFLOP/s: bf16 on tensor cores, f32\n"
          "  --shrink N    shapes N times smaller each way, N divides 12: for the simulator, where figures mean nothing\n", to);
}

static struct kern *open_kern(const char *isa, char *why, size_t why_bytes)
{
    if (device)
        return kern_module_open(device, NULL, why, why_bytes);
    struct kern *k = kern_cpu_open(&(struct kern_cpu_options){.threads = threads, .isa = isa}, why, why_bytes);
    if (k && !threads)
        sscanf(strchr(kern_name(k), ','), ", %d", &threads);
    is_amx = k && strstr(kern_name(k), "amx");
    return k;
}

static bool read_peaks(const char *text)
{
    double bf16, f32;
    if (sscanf(text, "%lf,%lf", &bf16, &f32) != 2)
        return false;
    published_gflops[0] = bf16 * 1e3, published_gflops[1] = f32 * 1e3;
    return true;
}

static int64_t less(int64_t size)
{
    return size < shrink ? 1 : size / shrink;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"threads", required_argument, NULL, 't'},
                                            {"isa", required_argument, NULL, 'i'},
                                            {"turns", required_argument, NULL, 'n'},
                                            {"device", required_argument, NULL, 'd'},
                                            {"peaks", required_argument, NULL, 'p'},
                                            {"shrink", required_argument, NULL, 's'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    const char *isa = NULL;
    for (int c; (c = getopt_long(argc, argv, "h", options, NULL)) != -1;) {
        if (c == 't')
            threads = atoi(optarg);
        else if (c == 'n')
            turns = atoi(optarg);
        else if (c == 'i')
            isa = optarg;
        else if (c == 'd')
            device = optarg;
        else if (c == 's' && atoi(optarg) > 0 && 12 % atoi(optarg) == 0) /* quantised rows are whole blocks of 256 */
            shrink = atoi(optarg);
        else if (c == 'p' && read_peaks(optarg))
            continue;
        else
            return usage(c == 'h' ? stdout : stderr), c == 'h' ? 0 : 2;
    }
    char why[256];
    struct kern *k = open_kern(isa, why, sizeof why);
    if (!k)
        return fprintf(stderr, "bench_kernels: %s\n", why), 2;
    static const enum quant_format formats[] = {QUANT_FP8_E4M3, QUANT_NVFP4, QUANT_Q8_0, QUANT_Q4_K, QUANT_Q6_K};
    bool all = optind == argc;
    for (int d = 0; d < 2; d++) {
        enum tensor_dtype dtype = d ? TENSOR_F32 : TENSOR_BF16;
        for (int i = optind; all || i < argc; i++) {
            if (all || !strcmp(argv[i], "gemm")) {
                bench_linear(k, dtype, less(768), less(27648), less(3072));
                bench_linear(k, dtype, less(768), less(9216), less(3072));
                bench_linear(k, dtype, less(768), less(3072), less(12288));
                bench_linear(k, dtype, less(1536), less(9216), less(3072));
                bench_linear(k, dtype, less(512), less(9728), less(2560));
            }
            for (size_t f = 0; !d && (all || !strcmp(argv[i], "quant")) && f < sizeof formats / sizeof *formats; f++) {
                bench_quant(k, formats[f], less(768), less(27648), less(3072));
                bench_quant(k, formats[f], less(768), less(3072), less(12288));
                bench_quant(k, formats[f], less(1536), less(9216), less(3072));
            }
            if (all || !strcmp(argv[i], "attention")) {
                bench_attention(k, dtype, less(768), less(24), 128);
                bench_attention(k, dtype, less(1536), less(24), 128);
                bench_attention(k, dtype, less(4608), less(24), 128);
            }
            if (all || !strcmp(argv[i], "conv")) {
                bench_conv(k, dtype, less(64), less(512), less(512));
                bench_conv(k, dtype, less(256), less(128), less(128));
            }
            if (all)
                break;
        }
    }
    if (!kern_sync(k))
        return fprintf(stderr, "bench_kernels: %s\n", kern_error(k)), 1;
    kern_close(k);
    return 0;
}
