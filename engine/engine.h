/* engine.h - prompt in, pixels out: one model on one rank of a team.
 *
 *   struct engine_options o = {.model_dir = "klein-4b", .precision = ENGINE_BF16};
 *   struct engine *e; struct engine_error why;
 *   if (!engine_open(&e, &o, &why)) ...
 *   struct engine_request r = {.prompt = "a fox", .width = 512, .height = 512, .seed = 42};
 *   engine_request_defaults(e, &r);                 -- steps, guidance: the model's own
 *   struct engine_image image;
 *   if (!engine_generate(e, &r, 1, &image, NULL, &why)) ...
 *   engine_image_done(&image); engine_close(e);
 *
 * The picture is a function of the request, the weights and the precision alone: not of the batch it
 * is in, the threads, or what ran before. Reference: engine-spec; target: diffusers. */
#ifndef KILN_ENGINE_H
#define KILN_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine_error.h"
#include "engine_placement.h"
#include "engine_precision.h"
#include "kern_team.h"
#include "tensor.h"

struct engine_adapter { const char *file; float strength; }; /* a LoRA file (lora.h) */
#define ENGINE_ADAPTERS_MAX 16

enum engine_variant { ENGINE_VARIANT_OF_FILES, ENGINE_DISTILLED, ENGINE_BASE };

/* A reference image, upright: at least 64 pixels a side, one side at most 8 times the other (reference.h). */
struct engine_reference {
    int width, height;
    const uint8_t *rgb;   /* height * width * 3 */
};

struct engine_options {
    const char *model_dir;            /* diffusers layout; parts may be files in it (model_parts.h); NULL: each part below is given */
    const char *transformer, *text_encoder, *vae; /* a file or folder of any known format instead of the folder's part; or NULL */
    const char *tokenizer;            /* a folder; or NULL */
    enum engine_variant variant;      /* what the user says where files cannot tell (model_variant.h) */
    bool (*sha256)(const char *path, char ret_hex[65]); /* tells published files of equal size apart; NULL: not asked */
    enum engine_precision precision;
    const struct engine_adapter *adapters; /* of the transformer, for everything that is rendered until engine_adapt */
    int adapter_count;
    int threads;                      /* 0: all */
    const char *isa;                  /* see kern_cpu.h; NULL: best */
    const char *device;               /* "cpu", "cuda", "cuda:1", "dry:rtx4090" (kern_dry.h); NULL: cpu */
    struct kern_member member;        /* one rank of a team (kern_team.h): its share of the weights; or empty */
    enum engine_placement placement;  /* the CPU accepts AUTO and RESIDENT */
    enum engine_split split;          /* PASSES: a base model on a team of two */
    /* The largest batch that is expected and must fit as well, with these references; 0: one picture of 1024x1024 */
    int plan_width, plan_height, plan_count, plan_reference_count;
    const struct engine_reference *plan_references;
};

#define ENGINE_SIDE_MIN 64
#define ENGINE_SIDE_MULTIPLE 16
#define ENGINE_PIXELS_MAX 4194304     /* 4 MP: 2048 x 2048 */
#define ENGINE_STEPS_MAX 1000
#define ENGINE_TOKENS_MAX 512
#define ENGINE_BATCH_MAX 64
#define ENGINE_REFERENCES_MAX 10

struct engine_request {
    const char *prompt;   /* UTF-8 */
    const char *negative; /* NULL or "": the empty prompt. Base models only; a distilled model refuses text here */
    int width, height;    /* multiples of 16, at least 64, at most 4 MP; both 0 with references: the size of the first as it
                             is seen, after engine_request_defaults */
    int steps;            /* 0: the model's default, after engine_request_defaults */
    float guidance;       /* NaN: the model's default; ignored by distilled models */
    uint64_t seed;
    bool truncate;        /* cut a prompt over 512 tokens instead of refusing it (recorded in the image) */
    const struct engine_reference *references; /* edit these, in the order in which the prompt may speak of them */
    int reference_count;
    const struct engine_reference *mask; /* or NULL. Repaint the first reference where this is white, at that one's size; any size */
    double strength;      /* with a mask: 0 to 1, the part of the schedule that is run; 0: 0.8, after engine_request_defaults */
    const struct tensor *noise; /* tests only: initial latents [128, h/16, w/16] f32 instead of the seed's; or NULL */
};

struct engine_timing {
    double load_s, encode_s, denoise_s, decode_s; /* encode_s: prompts that were not remembered, and references */
    size_t peak_bytes;       /* that the backend gave at most */
    size_t remembered_bytes; /* prompts, in host memory */
};

struct engine_image {
    int width, height;
    uint8_t *rgb;      /* height * width * 3, owned; engine_image_done frees */
    uint64_t seed;
    int steps;
    float guidance;    /* as used: 1 for distilled models */
    bool truncated;
    struct engine_timing timing; /* of the whole batch this image was in */
};

/* What the caller sees while a batch runs. Any member may be NULL. Called on the caller's thread. */
struct engine_watch {
    void *context;
    bool (*cancelled)(void *context);                       /* asked between steps; true ends the batch */
    void (*step)(void *context, int step, int steps);
    void (*dump)(void *context, const char *name, struct tensor value); /* tensors named in goldens/README.md */
};

struct engine;

bool engine_open(struct engine **ret, const struct engine_options *options, struct engine_error *why);
void engine_close(struct engine *e); /* accepts NULL */

/* engine_fits, of no engine: has a device with so much memory room for this model (options: files, precision; resident if that is the
 * placement, else in phases), for the share of one of `ranks`, and one picture of 1024x1024? *ret_bytes is what that takes, 0 where so
 * many cannot share it evenly. Neither batches nor what else is in memory change the answer. Nothing is loaded. */
bool engine_fits(const struct engine_options *options, int ranks, size_t memory, bool *ret, size_t *ret_bytes, struct engine_error *why);

/* engine_adapt: from now on the engine renders with these adapters and no others, as if it had been opened with them, to the
 * bit. Those that run beside the weights (adapters.h: plain LoRA) come and go in no time; where others come or go, the transformer is loaded
 * anew from the files that were there when the engine was opened. False: the engine renders nothing until it succeeds. */
bool engine_adapt(struct engine *e, const struct engine_adapter *adapters, int count, struct engine_error *why);

/* engine_request_defaults fills what was left open: 4 steps and guidance 1 for distilled models, 50 and 4 for base models;
 * the size from the first reference; the strength of a mask. */
void engine_request_defaults(const struct engine *e, struct engine_request *r);

/* engine_check (of a team: on all ranks) says whether this request could be rendered, without rendering (size, steps, tokens..). */
bool engine_check(struct engine *e, const struct engine_request *r, struct engine_error *why);

/* A team is an engine on each rank, all opened for the same model and asked to generate the same, each by a thread of its own; a
 * failure of one is that of all. Pictures are the first rank's; of the others `images` may be NULL. worker/team.h is the one
 * who does that.
 *
 * engine_generate renders `count` requests of one width, height, steps, guidance, number of references, sizes to which these
 * are cut (engine_reference_size) and strength, all with a mask or all without, as one batch.
 * On failure no image is allocated. */
bool engine_generate(struct engine *e, const struct engine_request *requests, int count, struct engine_image *images,
                     const struct engine_watch *watch, struct engine_error *why);
void engine_image_done(struct engine_image *image);

/* engine_reference_size: the size at which a reference of this size is seen (and that of the picture when none is asked for). */
bool engine_reference_size(int width, int height, int *ret_width, int *ret_height, struct engine_error *why);

/* engine_reference_scale and engine_mask_scale: pixels that are malloc'ed become those that will be looked at, at most 3 MB, and the
 * picture stays the same to the bit. So one who keeps many files' pixels need not keep them whole. What no request could use
 * stays as it is, for engine_check to refuse. False: no memory. */
bool engine_reference_scale(struct engine_reference *r, struct engine_error *why);
bool engine_mask_scale(struct engine_reference *mask, const struct engine_reference *first, struct engine_error *why);

struct engine_info {
    char family[32];       /* "klein-4b", "klein-9b", "klein-custom" */
    bool is_distilled;
    char licence[64];      /* "Apache-2.0", "FLUX Non-Commercial", or "unknown" */
    char device[64];       /* "cpu avx512_bf16, 2 threads" */
    uint64_t parameters;
    bool has_fp8_units;    /* the device's; without them FP8 numbers are multiplied in wider ones */
    enum engine_placement placement;
    int waiting_blocks;    /* of the transformer, in host memory: streamed */
    char split[160];       /* of a team: what is split and why, "passes, because .."; else empty */
    enum engine_passes passes; /* of guidance: as the last batch ran them; before it, where that is planned, the one that is expected */
    /* Bytes of the device's memory, all 0 where that is the host's: weights that stay there; what a batch as expected takes
     * besides; what was gone before, to the driver or other programs; all. */
    size_t model_bytes, arena_bytes, other_bytes, device_bytes;
};
const struct engine_info *engine_info(const struct engine *e);

/* engine_needs: by placement, the bytes that a GPU must have beside its driver's for one picture of 1024x1024, and for an edit of a
 * reference of that size, 0 where the model has no encoder. Counted from the headers of the files: nothing is loaded and no device is
 * asked. */
struct engine_needs {
    size_t image[ENGINE_STREAMED + 1], edit[ENGINE_STREAMED + 1];
};
bool engine_needs(struct engine_needs *ret, const struct engine_options *options, struct engine_error *why);

#endif
