/* msg.c - the messages as tables (wire.h), and the two bytes in front of them.
 *
 * Version 2: a task has inputs. A worker that skipped them would make another picture, so versions 1 and 2 do not talk.
 *
 * A new field is a line here and a member in msg.h; old peers skip it, and it must be optional for them to
 * be understood by new ones. A field is never given another meaning. */
#include "msg.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wire.h"

#define HEAD_BYTES 2
#define COUNT(list) (sizeof(list) / sizeof *(list))

#define FIELD(kind, of, member) .key = #member, .type = kind, .offset = offsetof(struct of, member)
#define U32(of, member) {FIELD(WIRE_U32, of, member)}
#define U64(of, member) {FIELD(WIRE_U64, of, member)}
#define F64(of, member) {FIELD(WIRE_F64, of, member)}
#define BOOL(of, member) {FIELD(WIRE_BOOL, of, member)}
#define TEXT(of, member, most) {FIELD(WIRE_TEXT, of, member), .max = most}
#define ENUM(of, member, most) {FIELD(WIRE_ENUM, of, member), .max = most}
#define LIST(of, member, count_member, most, schema) \
    {FIELD(WIRE_LIST, of, member), .count_offset = offsetof(struct of, count_member), .max = most, .items = schema}
#define SCHEMA(label, of, list) {.name = label, .bytes = sizeof(struct of), .field_count = COUNT(list), .fields = list}

#define DIGEST_MAX 64
#define WORD_MAX 32 /* format, use, precision */

static const struct wire_field model_fields[] = {
    TEXT(msg_model, name, MSG_NAME_MAX),   TEXT(msg_model, digest, DIGEST_MAX), TEXT(msg_model, family, MSG_NAME_MAX),
    TEXT(msg_model, licence, MSG_NAME_MAX), BOOL(msg_model, is_distilled),
};
static const struct wire_schema model_schema = SCHEMA("model", msg_model, model_fields);

static const struct wire_field hello_fields[] = {
    U32(msg_hello, protocol_min),
    U32(msg_hello, protocol_max),
    TEXT(msg_hello, software, MSG_NAME_MAX),
    TEXT(msg_hello, worker, MSG_NAME_MAX),
    U64(msg_hello, boot_epoch),
    TEXT(msg_hello, device, MSG_NAME_MAX),
    TEXT(msg_hello, precision, WORD_MAX),
    U64(msg_hello, memory_bytes),
    TEXT(msg_hello, host, 255),
    U32(msg_hello, pid),
    {FIELD(WIRE_LIST, msg_hello, models), .count_offset = offsetof(struct msg_hello, model_count),
     .max = MSG_MODELS_MAX, .items = &model_schema, .is_array = true},
};

static const struct wire_field welcome_fields[] = {
    U32(msg_welcome, protocol),
    TEXT(msg_welcome, coordinator, MSG_NAME_MAX),
    U32(msg_welcome, heartbeat_ms),
    U32(msg_welcome, silent_ms),
};

static const struct wire_field refused_fields[] = {
    TEXT(msg_refused, reason, MSG_REASON_MAX),
    {FIELD(WIRE_BOOL, msg_refused, is_final), .is_optional = true},
};

static const struct wire_field held_fields[] = {U64(msg_held, task), U64(msg_held, token)};
static const struct wire_schema held_schema = SCHEMA("held", msg_held, held_fields);
static const struct wire_field ready_fields[] = {
    U32(msg_ready, credit),
    U32(msg_ready, batch_max),
    {FIELD(WIRE_LIST, msg_ready, held), .count_offset = offsetof(struct msg_ready, held_count), .max = MSG_ITEMS_MAX,
     .items = &held_schema, .is_optional = true},
};

static const struct wire_field task_fields[] = {
    U64(msg_task, task),
    U64(msg_task, token),
    U32(msg_task, attempt),
    TEXT(msg_task, prompt, MSG_PROMPT_MAX),
    TEXT(msg_task, negative, MSG_PROMPT_MAX),
    U64(msg_task, seed),
    BOOL(msg_task, truncate),
    TEXT(msg_task, file, 255),
    TEXT(msg_task, inputs, MSG_INPUTS_MAX),
};
static const struct wire_schema task_schema = SCHEMA("task", msg_task, task_fields);

static const struct wire_field assign_fields[] = {
    U64(msg_assign, batch),
    U32(msg_assign, lease_ms),
    TEXT(msg_assign, campaign, MSG_NAME_MAX),
    TEXT(msg_assign, model, MSG_NAME_MAX),
    TEXT(msg_assign, out_dir, MSG_PATH_MAX),
    TEXT(msg_assign, format, WORD_MAX),
    TEXT(msg_assign, use, WORD_MAX),
    U32(msg_assign, width),
    U32(msg_assign, height),
    U32(msg_assign, steps),
    F64(msg_assign, guidance),
    LIST(msg_assign, tasks, count, MSG_ITEMS_MAX, &task_schema),
};

static const struct wire_field heartbeat_fields[] = {
    U64(msg_heartbeat, step_counter), U32(msg_heartbeat, held), U32(msg_heartbeat, spooled), F64(msg_heartbeat, load),
    TEXT(msg_heartbeat, state, MSG_REASON_MAX),
};

static const struct wire_field progress_fields[] = {
    U64(msg_progress, batch), U32(msg_progress, step), U32(msg_progress, steps)};

static const struct wire_field result_item_fields[] = {
    U64(msg_result_item, task),
    U64(msg_result_item, token),
    TEXT(msg_result_item, sha256, DIGEST_MAX),
    U64(msg_result_item, bytes),
    U32(msg_result_item, width),
    U32(msg_result_item, height),
    U32(msg_result_item, steps),
    F64(msg_result_item, guidance),
    U64(msg_result_item, seed),
    TEXT(msg_result_item, file, 255),
    TEXT(msg_result_item, digest, DIGEST_MAX),
    BOOL(msg_result_item, truncated),
    F64(msg_result_item, render_s),
};
static const struct wire_schema result_item_schema = SCHEMA("result", msg_result_item, result_item_fields);
static const struct wire_field result_fields[] = {LIST(msg_result, items, count, MSG_ITEMS_MAX, &result_item_schema)};

static const struct wire_field failed_item_fields[] = {
    U64(msg_failed_item, task),
    U64(msg_failed_item, token),
    ENUM(msg_failed_item, kind, MSG_FAILURE_RELEASED),
    TEXT(msg_failed_item, reason, MSG_REASON_MAX),
};
static const struct wire_schema failed_item_schema = SCHEMA("failure", msg_failed_item, failed_item_fields);
static const struct wire_field failed_fields[] = {LIST(msg_failed, items, count, MSG_ITEMS_MAX, &failed_item_schema)};

static const struct wire_field ack_item_fields[] = {
    U64(msg_ack_item, task), U64(msg_ack_item, token), ENUM(msg_ack_item, verdict, MSG_STALE)};
static const struct wire_schema ack_item_schema = SCHEMA("ack", msg_ack_item, ack_item_fields);
static const struct wire_field ack_fields[] = {LIST(msg_ack, items, count, MSG_ITEMS_MAX, &ack_item_schema)};

static const struct wire_field cancel_fields[] = {
    {FIELD(WIRE_NUMBERS, msg_cancel, tasks), .count_offset = offsetof(struct msg_cancel, count), .max = MSG_ITEMS_MAX},
    TEXT(msg_cancel, reason, MSG_REASON_MAX),
};

static const struct wire_field bye_fields[] = {TEXT(msg_bye, reason, MSG_REASON_MAX)};

static const struct wire_schema schemas[] = {
    [MSG_HELLO] = SCHEMA("hello", msg_hello, hello_fields),
    [MSG_WELCOME] = SCHEMA("welcome", msg_welcome, welcome_fields),
    [MSG_REFUSED] = SCHEMA("refused", msg_refused, refused_fields),
    [MSG_READY] = SCHEMA("ready", msg_ready, ready_fields),
    [MSG_ASSIGN] = SCHEMA("assign", msg_assign, assign_fields),
    [MSG_HEARTBEAT] = SCHEMA("heartbeat", msg_heartbeat, heartbeat_fields),
    [MSG_PROGRESS] = SCHEMA("progress", msg_progress, progress_fields),
    [MSG_RESULT] = SCHEMA("result", msg_result, result_fields),
    [MSG_FAILED] = SCHEMA("failed", msg_failed, failed_fields),
    [MSG_ACK] = SCHEMA("ack", msg_ack, ack_fields),
    [MSG_CANCEL] = SCHEMA("cancel", msg_cancel, cancel_fields),
    [MSG_DRAIN] = {.name = "drain"},
    [MSG_BYE] = SCHEMA("bye", msg_bye, bye_fields),
};

/* Every member of the union begins where `hello` does. */
static const struct wire_schema *schema_of(unsigned kind)
{
    return kind >= MSG_HELLO && kind <= MSG_BYE ? &schemas[kind] : NULL;
}

static bool head_ok(const uint8_t *head, size_t bytes, char *why, size_t why_bytes)
{
    if (bytes != HEAD_BYTES) {
        snprintf(why, why_bytes, "the first frame has %zu bytes, want %d: version and kind", bytes, HEAD_BYTES);
        return false;
    }
    bool any_version = head[1] == MSG_HELLO || head[1] == MSG_REFUSED;
    if (head[0] != MSG_VERSION && !any_version) {
        snprintf(why, why_bytes, "protocol version %u, this program (kiln %s) speaks %d", head[0], KILN_VERSION,
                 MSG_VERSION);
        return false;
    }
    if (!schema_of(head[1])) {
        snprintf(why, why_bytes, "message kind %u is unknown; known are 1 (hello) to %d (bye)", head[1], MSG_BYE);
        return false;
    }
    return true;
}

bool msg_decode(struct msg *ret, const void *head, size_t head_bytes, const void *body, size_t body_bytes, char *why,
                size_t why_bytes)
{
    if (!head_ok(head, head_bytes, why, why_bytes))
        return false;
    unsigned kind = ((const uint8_t *)head)[1];
    if (body_bytes > MSG_BYTES_MAX) {
        snprintf(why, why_bytes, "%s: %zu bytes, at most %u", schemas[kind].name, body_bytes, MSG_BYTES_MAX);
        return false;
    }
    struct msg m;
    memset(&m, 0, sizeof m);
    m.kind = (enum msg_kind)kind;
    if (!wire_decode(&schemas[kind], body, body_bytes, &m.hello, &m.block, why, why_bytes))
        return false;
    *ret = m;
    return true;
}

bool msg_encode(const struct msg *m, uint8_t head[2], void **ret_body, size_t *ret_bytes, char *why, size_t why_bytes)
{
    const struct wire_schema *schema = schema_of(m->kind);
    if (!schema) {
        snprintf(why, why_bytes, "message kind %d is unknown", (int)m->kind);
        return false;
    }
    void *body;
    size_t bytes;
    if (!wire_encode(schema, &m->hello, &body, &bytes, why, why_bytes))
        return false;
    if (bytes > MSG_BYTES_MAX) {
        snprintf(why, why_bytes, "%s: %zu bytes, at most %u", schema->name, bytes, MSG_BYTES_MAX);
        free(body);
        return false;
    }
    head[0] = MSG_VERSION;
    head[1] = (uint8_t)m->kind;
    *ret_body = body;
    *ret_bytes = bytes;
    return true;
}

void msg_done(struct msg *m)
{
    if (!m)
        return;
    free(m->block);
    memset(m, 0, sizeof *m);
}

bool msg_worker_name_ok(const char *name)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    return *name && *name != '.' && strspn(name, letters) == strlen(name);
}

const char *msg_kind_name(enum msg_kind kind)
{
    const struct wire_schema *schema = schema_of(kind);
    return schema ? schema->name : "unknown";
}

const char *msg_failure_name(enum msg_failure kind)
{
    switch (kind) {
    case MSG_FAILURE_REFUSE: return "refuse";
    case MSG_FAILURE_RETRY: return "retry";
    case MSG_FAILURE_OOM: return "oom";
    case MSG_FAILURE_RELEASED: return "released";
    }
    return "unknown";
}
