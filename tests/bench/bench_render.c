/* bench_render.c - whole renders of a small model against the work they hold.
 *
 * Prints JSON lines {"name","value","unit","limit","ratio"}. The limit of a figure is the time that the multiplications
 * of these renders (engine-spec 11; only those, no norms, no softmax) take at the rate of one large matrix product of the
 * same backend and precision, measured right before. With many seeds per prompt the text is encoded once, as in a campaign. */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine.h"
#include "kern.h"
#include "kern_cpu.h"
#include "model_config.h"
#include "text_encoder.h"

#define SECONDS_EACH 2.0

struct bench {
    const char *model;
    int width, height, threads;
    struct model_config config;
    double encode_flops, step_flops, decode_flops; /* of one prompt, one step of one image, one image */
};

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- work ----------------------------------------------------------------------------------------------- */

static double encode_flops(const struct text_encoder_config *c, const struct transformer_config *t)
{
    double d = c->hidden_size, heads = (double)c->num_attention_heads * c->head_dim;
    double kv = (double)c->num_key_value_heads * c->head_dim, rows = TEXT_ENCODER_ROWS;
    double linear = 2 * rows * (d * (heads + 2 * kv) + heads * d + 3 * d * c->intermediate_size);
    double attention = 2 * rows * rows * heads; /* half of the pairs: causal */
    return TEXT_ENCODER_LAYERS * (linear + attention) + 2 * rows * t->joint_attention_dim * t->hidden;
}

static double step_flops(const struct transformer_config *c, double tokens)
{
    double h = c->hidden, s = TEXT_ENCODER_ROWS + tokens, layers = c->num_layers + c->num_single_layers;
    return layers * (26 * h * h * s + 4 * s * s * h) + 4 * c->in_channels * h * tokens;
}

static double resnet_flops(double in, double out, double pixels)
{
    return 2 * pixels * (9 * in * out + 9 * out * out + (in == out ? 0 : in * out));
}

static double decode_flops(const struct vae_config *c, double pixels)
{
    double deep = c->decoder_block_out_channels[3], latent = c->latent_channels, in = deep;
    double sum = 2 * pixels * (latent * latent + 9 * latent * deep) + 2 * resnet_flops(deep, deep, pixels) +
                 8 * pixels * deep * deep + 4 * pixels * pixels * deep;
    for (int level = 0; level < 4; level++) {
        double out = c->decoder_block_out_channels[3 - level];
        for (int i = 0; i <= c->layers_per_block; i++)
            sum += resnet_flops(i ? out : in, out, pixels);
        if (level < 3) {
            pixels *= 4;
            sum += 18 * pixels * out * out;
        }
        in = out;
    }
    return sum + 54 * pixels * in;
}

/* FLOP/s of one product [1024, 2048] x [2048, 2048]. */
static double product_rate(const struct bench *b, enum tensor_dtype dtype)
{
    enum { ROWS = 1024, WIDTH = 2048 };
    char why[256];
    struct kern *k = kern_cpu_open(&(struct kern_cpu_options){.threads = b->threads}, why, sizeof why);
    void *zeros = calloc((size_t)WIDTH * WIDTH, 4);
    if (!k || !zeros) {
        fprintf(stderr, "bench_render: %s\n", k ? "no memory" : why);
        exit(1);
    }
    struct kern_weight *w = kern_weight_linear(k, dtype, tensor_2d(zeros, dtype, WIDTH, WIDTH), (struct tensor){0});
    struct tensor x = kern_temp(k, dtype, 2, (int64_t[]){ROWS, WIDTH}), y = kern_temp(k, dtype, 2, (int64_t[]){ROWS, WIDTH});
    kern_linear(k, x, tensor_2d(zeros, dtype, ROWS, WIDTH), w);
    double best = 0;
    for (int i = 0; i < 10; i++) {
        double start = now_s();
        kern_linear(k, y, x, w);
        kern_sync(k);
        best = fmax(best, 2.0 * ROWS * WIDTH * WIDTH / (now_s() - start));
    }
    kern_weight_free(k, w);
    kern_close(k);
    free(zeros);
    return best;
}

/* --- figures ---------------------------------------------------------------------------------------------- */

static void report(const char *name, double value, const char *unit, double limit)
{
    printf("{\"name\":\"%s\",\"value\":%.4g,\"unit\":\"%s\",\"limit\":%.4g,\"ratio\":%.3f}\n", name, value, unit, limit,
           value / limit);
    fflush(stdout);
}

/* Renders batches for a while. Prompts: all the same and known, or each a new one. */
static void measure(const struct bench *b, struct engine *e, const char *precision, double rate, int batch, bool is_new)
{
    static uint64_t number;
    struct engine_request r[ENGINE_BATCH_MAX];
    struct engine_image images[ENGINE_BATCH_MAX];
    struct engine_error why;
    char prompts[ENGINE_BATCH_MAX][64], name[96];
    struct engine_timing sum = {0};
    double start = 0, seconds = 0;
    int count = 0, steps = 0;
    for (int round = 0; round < 2 || seconds < SECONDS_EACH; round++) { /* the first warms up */
        if (round == 1)
            start = now_s();
        for (int i = 0; i < batch; i++, number++) {
            snprintf(prompts[i], sizeof prompts[i], is_new ? "a red fox number %llu" : "a red fox", (unsigned long long)number);
            r[i] = (struct engine_request){.prompt = prompts[i], .width = b->width, .height = b->height, .guidance = NAN,
                                           .seed = number};
            engine_request_defaults(e, &r[i]);
        }
        if (!engine_generate(e, r, batch, images, NULL, &why)) {
            fprintf(stderr, "bench_render: %s\n", why.text);
            exit(1);
        }
        for (int i = 0; i < batch; i++)
            engine_image_done(&images[i]);
        if (round == 0)
            continue;
        sum.encode_s += images[0].timing.encode_s, sum.denoise_s += images[0].timing.denoise_s;
        sum.decode_s += images[0].timing.decode_s;
        count += batch, steps = r[0].steps;
        seconds = now_s() - start;
    }
    double work = (is_new ? b->encode_flops : 0) + steps * b->step_flops + b->decode_flops;
    snprintf(name, sizeof name, "render %s %dx%d batch %d, %s", precision, b->width, b->height, batch,
             is_new ? "new prompts" : "one prompt");
    report(name, count / seconds, "images/s", rate / work);
    if (batch > 1 || !is_new)
        return;
    snprintf(name, sizeof name, "encode %s", precision);
    report(name, sum.encode_s / count, "s", b->encode_flops / rate);
    snprintf(name, sizeof name, "denoise %s, %d steps", precision, steps);
    report(name, sum.denoise_s / count, "s", steps * b->step_flops / rate);
    snprintf(name, sizeof name, "decode %s", precision);
    report(name, sum.decode_s / count, "s", b->decode_flops / rate);
}

static bool read_options(struct bench *b, int argc, char **argv)
{
    static const struct option options[] = {{"model", required_argument, NULL, 'm'},
                                            {"size", required_argument, NULL, 's'},
                                            {"threads", required_argument, NULL, 't'},
                                            {NULL, 0, NULL, 0}};
    *b = (struct bench){.width = 64, .height = 64};
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (o == 'm')
            b->model = optarg;
        else if (o == 't')
            b->threads = atoi(optarg);
        else if (o != 's' || sscanf(optarg, "%dx%d", &b->width, &b->height) != 2)
            return false;
    }
    return b->model != NULL;
}

int main(int argc, char **argv)
{
    struct bench b;
    struct engine_error why;
    if (!read_options(&b, argc, argv)) {
        fprintf(stderr, "usage: bench_render --model DIR [--size WxH] [--threads N]\n");
        return 2;
    }
    if (!model_config_load(&b.config, b.model, &why)) {
        fprintf(stderr, "bench_render: %s\n", why.text);
        return 2;
    }
    b.encode_flops = encode_flops(&b.config.text, &b.config.transformer);
    b.step_flops = step_flops(&b.config.transformer, b.width / 16 * (b.height / 16));
    b.decode_flops = decode_flops(&b.config.vae, b.width / 8 * (b.height / 8));
    for (int p = 0; p < 2; p++) {
        const char *precision = p ? "bf16" : "f32";
        struct engine *e;
        double rate = product_rate(&b, p ? TENSOR_BF16 : TENSOR_F32);
        if (!engine_open(&e, &(struct engine_options){.model_dir = b.model, .threads = b.threads,
                                                      .precision = p ? ENGINE_BF16 : ENGINE_F32}, &why)) {
            fprintf(stderr, "bench_render: %s\n", why.text);
            return 2;
        }
        for (int batch = 1; batch <= 8; batch *= 8) {
            measure(&b, e, precision, rate, batch, true);
            measure(&b, e, precision, rate, batch, false);
        }
        engine_close(e);
    }
    return 0;
}
