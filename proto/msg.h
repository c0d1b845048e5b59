/* msg.h - everything worker and coordinator say to each other, as structs (design section 5).
 *
 * On the wire: frame 0 = 2 bytes (protocol version, kind); frame 1 = a msgpack map with short string keys.
 * Unknown keys are ignored, unknown kinds refused. HELLO and REFUSED are read whatever version frame 0 names, so that
 * two releases can tell each other why they do not talk; their fields may only be added to. Every string and list has a limit here, checked before
 * anything is copied; reaching one is an error. A decoded message owns its memory in one block:
 * msg_done frees it. An encoded one borrows everything until msg_send returns. */
#ifndef KILN_MSG_H
#define KILN_MSG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MSG_VERSION 2
#define MSG_BYTES_MAX (64u << 20)   /* one header frame */
#define MSG_ITEMS_MAX 1024          /* tasks, results, acks in one message */
#define MSG_MODELS_MAX 64
#define MSG_NAME_MAX 128            /* worker, campaign, model names, in bytes */
#define MSG_PATH_MAX 4096
#define MSG_PROMPT_MAX 65536
#define MSG_REASON_MAX 2048
#define MSG_INPUTS_MAX (160u << 10)
#define MSG_LICENCE_NON_COMMERCIAL "FLUX Non-Commercial" /* msg_model.licence that forbids commercial use */

enum msg_kind {
    MSG_HELLO = 1, /* w→c who I am */
    MSG_WELCOME,   /* c→w you are in */
    MSG_REFUSED,   /* c→w you are not, and why */
    MSG_READY,     /* w→c my credit: how many images I take in all, and hold */
    MSG_ASSIGN,    /* c→w a batch of one shape */
    MSG_HEARTBEAT, /* both ways */
    MSG_PROGRESS,  /* w→c step of a batch */
    MSG_RESULT,    /* w→c finished images, staged; repeated until acknowledged */
    MSG_FAILED,    /* w→c tasks that did not become images; repeated until acknowledged */
    MSG_ACK,       /* c→w committed | stale, per task */
    MSG_CANCEL,    /* c→w stop these tasks between steps */
    MSG_DRAIN,     /* c→w take nothing new, finish, say bye */
    MSG_BYE,       /* w→c I am leaving; everything I still hold goes back */
};

enum msg_failure { MSG_FAILURE_REFUSE, MSG_FAILURE_RETRY, MSG_FAILURE_OOM, MSG_FAILURE_RELEASED };
    /* refuse: the row is wrong, never retried. retry: may work later. oom: retry, and halve the batch cap of
     * this shape. released: not attempted (drain, cancel): goes back without counting an attempt. */
enum msg_verdict { MSG_COMMITTED, MSG_STALE };

struct msg_model { const char *name, *digest, *family, *licence; bool is_distilled; };
struct msg_hello {
    uint32_t protocol_min, protocol_max;
    const char *software;       /* "kiln 0.1.0" */
    const char *worker;         /* name */
    uint64_t boot_epoch;        /* new for each process: name + epoch is the identity */
    const char *device;         /* "cpu avx512_bf16, 2 threads" */
    const char *precision;      /* "bf16" */
    uint64_t memory_bytes;
    const char *host; uint32_t pid;
    uint32_t model_count; struct msg_model models[MSG_MODELS_MAX];
};
struct msg_welcome { uint32_t protocol; const char *coordinator; uint32_t heartbeat_ms, silent_ms; };
struct msg_refused {
    const char *reason;
    bool is_final; /* waiting does not help (protocol, licence of the farm ..): the worker exits. False: it tries again */
};
struct msg_held { uint64_t task, token; };
struct msg_ready {
    uint32_t credit, batch_max; /* un-acknowledged images at most, beyond those below; images per batch at most */
    /* Tasks from before this WELCOME, still rendering or queued (optional, NULL: none). A coordinator that was restarted
     * learns here whose leases to extend; they count beside the credit until their acks. */
    uint32_t held_count; struct msg_held *held;
};

struct msg_task { /* one image to make; the batch shares model, width, height, steps, guidance, the sizes
                     * of its inputs and its adapters */
    uint64_t task, token;       /* the lease token fences every later word about this task */
    uint32_t attempt;
    const char *prompt, *negative;
    uint64_t seed;
    bool truncate;
    const char *file;           /* name in the campaign's folder, "000012-1f2e3d4c.png" */
    const char *inputs;         /* references, mask, LoRA (ops/store/task_inputs.h); "": none. Version 2 */
};
struct msg_assign {
    uint64_t batch;
    uint32_t lease_ms;
    const char *campaign, *model, *out_dir, *format, *use; /* format png|jpg|webp; use commercial|non-commercial|"" */
    uint32_t width, height, steps;  /* steps 0: the model's default */
    double guidance;                /* NaN: the model's default */
    uint32_t count; struct msg_task *tasks;
};
struct msg_heartbeat { uint64_t step_counter; uint32_t held, spooled; double load; const char *state; };
struct msg_progress { uint64_t batch; uint32_t step, steps; };
struct msg_result_item {
    uint64_t task, token;
    const char *sha256;         /* 64 hex digits of the file */
    uint64_t bytes;
    uint32_t width, height, steps;
    double guidance;
    uint64_t seed;
    const char *file;
    const char *digest;         /* of the model's weights */
    bool truncated;
    double render_s;            /* batch time / batch size */
};
struct msg_result { uint32_t count; struct msg_result_item *items; };
struct msg_failed_item { uint64_t task, token; enum msg_failure kind; const char *reason; };
struct msg_failed { uint32_t count; struct msg_failed_item *items; };
struct msg_ack_item { uint64_t task, token; enum msg_verdict verdict; };
struct msg_ack { uint32_t count; struct msg_ack_item *items; };
struct msg_cancel { uint32_t count; uint64_t *tasks; const char *reason; };
struct msg_bye { const char *reason; };

struct msg {
    enum msg_kind kind;
    union {
        struct msg_hello hello; struct msg_welcome welcome; struct msg_refused refused; struct msg_ready ready;
        struct msg_assign assign; struct msg_heartbeat heartbeat; struct msg_progress progress;
        struct msg_result result; struct msg_failed failed; struct msg_ack ack; struct msg_cancel cancel;
        struct msg_bye bye;
    };
    void *block; /* what msg_done frees */
};

/* msg_decode reads one message (frame 0 and 1). False: why says which field and what was found. */
bool msg_decode(struct msg *ret, const void *head, size_t head_bytes, const void *body, size_t body_bytes,
                char *why, size_t why_bytes);
/* msg_encode writes the body into a malloc'ed buffer the caller frees; head is MSG_VERSION, kind. */
bool msg_encode(const struct msg *m, uint8_t head[2], void **ret_body, size_t *ret_bytes, char *why, size_t why_bytes);
void msg_done(struct msg *m);
/* msg_worker_name_ok: a worker's name is a folder, a routing id and a label: no character that any of them minds. */
bool msg_worker_name_ok(const char *name);
const char *msg_kind_name(enum msg_kind kind);       /* "hello" */
const char *msg_failure_name(enum msg_failure kind); /* "refuse" */

#endif
