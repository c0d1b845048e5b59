/* wire.c - the one file that knows msgpack.
 *
 * Writing uses the library's packer. Reading is a cursor of our own over the bytes: the library's unpacker asks
 * for memory by the counts it is told before it has seen the data, and a peer may tell it anything.
 *
 * A message is read twice by the same code: the first pass has no block, checks everything and adds up
 * what texts and lists need; the second copies into one block of exactly that size. So no byte is
 * allocated for a message that is wrong. The cursor remembers the first failure; later reads do nothing. */
#include "wire.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <msgpack.h>
#include <stdalign.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum token_type {
    TOKEN_NIL,
    TOKEN_BOOL,
    TOKEN_UNSIGNED,
    TOKEN_NEGATIVE,
    TOKEN_FLOAT,
    TOKEN_TEXT,
    TOKEN_BYTES,
    TOKEN_LIST,
    TOKEN_MAP,
};

struct token { /* one msgpack header, and the bytes of a text */
    enum token_type type;
    uint64_t number; /* value, or count of bytes, items, pairs */
    double real;
    const char *text;
};

struct reader {
    const uint8_t *at, *end;
    uint8_t *block;     /* NULL: the pass that checks and measures */
    size_t block_bytes; /* taken so far */
    bool failed;
    char why[512];
};

/* --- errors ---------------------------------------------------------------------------------------- */

static bool __attribute__((format(printf, 2, 3))) fail(struct reader *r, const char *format, ...)
{
    if (r->failed)
        return false;
    r->failed = true;
    va_list list;
    va_start(list, format);
    vsnprintf(r->why, sizeof r->why, format, list);
    va_end(list);
    return false;
}

/* Puts "context: " in front of the failure; the text becomes a path to the cause. What does not fit falls off its end. */
static void put_in_front(char *why, size_t why_bytes, const char *context)
{
    size_t front = strlen(context) + 2, keep = strlen(why);
    if (front >= why_bytes)
        return;
    if (front + keep >= why_bytes)
        keep = why_bytes - front - 1;
    memmove(why + front, why, keep);
    memcpy(why, context, front - 2);
    memcpy(why + front - 2, ": ", 2);
    why[front + keep] = 0;
}

/* --- UTF-8 ----------------------------------------------------------------------------------------- */

/* Bytes of the character at p, or 0 if it is none: overlong forms, surrogates and beyond U+10FFFF are none. */
static size_t character_bytes(const uint8_t *p, size_t left)
{
    if (p[0] < 0x80)
        return 1;
    size_t want = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : 2;
    if (p[0] < 0xc2 || p[0] > 0xf4 || want > left)
        return 0;
    for (size_t i = 1; i < want; i++)
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    if ((p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f) || (p[0] == 0xf0 && p[1] < 0x90) ||
        (p[0] == 0xf4 && p[1] > 0x8f))
        return 0;
    return want;
}

/* Offset of the first byte that is not UTF-8 or is NUL, or bytes. */
static size_t text_fault(const char *text, size_t bytes)
{
    const uint8_t *p = (const uint8_t *)text;
    size_t i = 0;
    while (i < bytes && p[i] != 0) {
        size_t step = character_bytes(p + i, bytes - i);
        if (step == 0)
            break;
        i += step;
    }
    return i;
}

/* --- the cursor ------------------------------------------------------------------------------------- */

static uint64_t take_big_endian(struct reader *r, size_t bytes)
{
    if ((size_t)(r->end - r->at) < bytes) {
        fail(r, "the message ends too early");
        return 0;
    }
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; i++)
        value = value << 8 | *r->at++;
    return value;
}

static void take_signed(struct reader *r, struct token *t, size_t bytes)
{
    uint64_t raw = take_big_endian(r, bytes);
    bool is_negative = raw >> (8 * bytes - 1) & 1;
    t->type = is_negative ? TOKEN_NEGATIVE : TOKEN_UNSIGNED;
    t->number = raw;
}

static void take_float(struct reader *r, struct token *t, size_t bytes)
{
    uint64_t raw = take_big_endian(r, bytes);
    t->type = TOKEN_FLOAT;
    if (bytes == 4) {
        uint32_t half = (uint32_t)raw;
        float value;
        memcpy(&value, &half, sizeof value);
        t->real = value;
    } else {
        memcpy(&t->real, &raw, sizeof t->real);
    }
}

/* extra: bytes that belong to the value beside its length, such as the type byte of an extension. */
static void take_bytes(struct reader *r, struct token *t, enum token_type type, uint64_t count, uint64_t extra)
{
    t->type = type;
    t->number = count;
    t->text = (const char *)r->at;
    if ((uint64_t)(r->end - r->at) < count + extra) {
        fail(r, "says %" PRIu64 " bytes, %td are left", count + extra, r->end - r->at);
        return;
    }
    r->at += count + extra;
}

static void take_count(struct reader *r, struct token *t, enum token_type type, uint64_t count)
{
    uint64_t least = type == TOKEN_MAP ? 2 * count : count; /* every item takes a byte */
    t->type = type;
    t->number = count;
    if ((uint64_t)(r->end - r->at) < least)
        fail(r, "says %" PRIu64 " %s, %td bytes are left", count, type == TOKEN_MAP ? "pairs" : "items",
             r->end - r->at);
}

static bool take_token(struct reader *r, struct token *t)
{
    memset(t, 0, sizeof *t);
    uint64_t head = take_big_endian(r, 1);
    if (r->failed)
        return false;
    if (head <= 0x7f) {
        t->type = TOKEN_UNSIGNED;
        t->number = head;
    } else if (head <= 0x8f) {
        take_count(r, t, TOKEN_MAP, head & 0x0f);
    } else if (head <= 0x9f) {
        take_count(r, t, TOKEN_LIST, head & 0x0f);
    } else if (head <= 0xbf) {
        take_bytes(r, t, TOKEN_TEXT, head & 0x1f, 0);
    } else if (head >= 0xe0) {
        t->type = TOKEN_NEGATIVE;
    } else {
        switch (head) {
        case 0xc0: t->type = TOKEN_NIL; break;
        case 0xc1: fail(r, "byte 0xc1 begins no value"); break;
        case 0xc2:
        case 0xc3:
            t->type = TOKEN_BOOL;
            t->number = head & 1;
            break;
        case 0xc4: take_bytes(r, t, TOKEN_BYTES, take_big_endian(r, 1), 0); break;
        case 0xc5: take_bytes(r, t, TOKEN_BYTES, take_big_endian(r, 2), 0); break;
        case 0xc6: take_bytes(r, t, TOKEN_BYTES, take_big_endian(r, 4), 0); break;
        case 0xc7: take_bytes(r, t, TOKEN_BYTES, take_big_endian(r, 1), 1); break;
        case 0xc8: take_bytes(r, t, TOKEN_BYTES, take_big_endian(r, 2), 1); break;
        case 0xc9: take_bytes(r, t, TOKEN_BYTES, take_big_endian(r, 4), 1); break;
        case 0xca: take_float(r, t, 4); break;
        case 0xcb: take_float(r, t, 8); break;
        case 0xcc:
        case 0xcd:
        case 0xce:
        case 0xcf:
            t->type = TOKEN_UNSIGNED;
            t->number = take_big_endian(r, (size_t)1 << (head - 0xcc));
            break;
        case 0xd0:
        case 0xd1:
        case 0xd2:
        case 0xd3: take_signed(r, t, (size_t)1 << (head - 0xd0)); break;
        case 0xd4:
        case 0xd5:
        case 0xd6:
        case 0xd7:
        case 0xd8: take_bytes(r, t, TOKEN_BYTES, (uint64_t)1 << (head - 0xd4), 1); break;
        case 0xd9: take_bytes(r, t, TOKEN_TEXT, take_big_endian(r, 1), 0); break;
        case 0xda: take_bytes(r, t, TOKEN_TEXT, take_big_endian(r, 2), 0); break;
        case 0xdb: take_bytes(r, t, TOKEN_TEXT, take_big_endian(r, 4), 0); break;
        case 0xdc: take_count(r, t, TOKEN_LIST, take_big_endian(r, 2)); break;
        case 0xdd: take_count(r, t, TOKEN_LIST, take_big_endian(r, 4)); break;
        case 0xde: take_count(r, t, TOKEN_MAP, take_big_endian(r, 2)); break;
        case 0xdf: take_count(r, t, TOKEN_MAP, take_big_endian(r, 4)); break;
        }
    }
    return !r->failed;
}

static void skip_value(struct reader *r, int depth)
{
    struct token t;
    if (depth > WIRE_DEPTH_MAX) {
        fail(r, "nested more than %d deep", WIRE_DEPTH_MAX);
        return;
    }
    if (!take_token(r, &t) || (t.type != TOKEN_LIST && t.type != TOKEN_MAP))
        return;
    uint64_t values = t.type == TOKEN_MAP ? 2 * t.number : t.number;
    for (uint64_t i = 0; i < values && !r->failed; i++)
        skip_value(r, depth + 1);
}

static const char *token_name(enum token_type type)
{
    switch (type) {
    case TOKEN_NIL: return "nil";
    case TOKEN_BOOL: return "a bool";
    case TOKEN_UNSIGNED: return "a number";
    case TOKEN_NEGATIVE: return "a negative number";
    case TOKEN_FLOAT: return "a fraction";
    case TOKEN_TEXT: return "a text";
    case TOKEN_BYTES: return "bytes";
    case TOKEN_LIST: return "a list";
    case TOKEN_MAP: return "a map";
    }
    return "nothing";
}

static bool take_of_type(struct reader *r, struct token *t, enum token_type want)
{
    if (!take_token(r, t))
        return false;
    return t->type == want || fail(r, "found %s, want %s", token_name(t->type), token_name(want));
}

/* Room in the block, aligned; NULL in the pass that measures. */
static void *take_room(struct reader *r, size_t bytes, size_t alignment)
{
    size_t start = (r->block_bytes + alignment - 1) / alignment * alignment;
    r->block_bytes = start + bytes;
    return r->block ? r->block + start : NULL;
}

/* --- reading by schema ------------------------------------------------------------------------------- */

static void read_struct(struct reader *r, const struct wire_schema *schema, uint8_t *ret);

static void read_text(struct reader *r, const struct wire_field *f, uint8_t *ret)
{
    struct token t;
    if (!take_of_type(r, &t, TOKEN_TEXT))
        return;
    if (t.number > f->max) {
        fail(r, "%" PRIu64 " bytes, at most %" PRIu32, t.number, f->max);
        return;
    }
    size_t fault = text_fault(t.text, t.number);
    if (fault < t.number) {
        fail(r, "byte %zu of %" PRIu64 " is 0x%02x, which is no UTF-8 text", fault, t.number,
             (unsigned)(uint8_t)t.text[fault]);
        return;
    }
    char *copy = take_room(r, t.number + 1, 1);
    if (!copy)
        return;
    memcpy(copy, t.text, t.number);
    copy[t.number] = 0;
    memcpy(ret + f->offset, &copy, sizeof copy);
}

static uint32_t read_list_count(struct reader *r, const struct wire_field *f)
{
    struct token t;
    if (!take_of_type(r, &t, TOKEN_LIST))
        return 0;
    if (t.number > f->max) {
        fail(r, "%" PRIu64 " items, at most %" PRIu32, t.number, f->max);
        return 0;
    }
    return (uint32_t)t.number;
}

static void read_numbers(struct reader *r, const struct wire_field *f, uint8_t *ret)
{
    uint32_t count = read_list_count(r, f);
    uint64_t *list = take_room(r, count * sizeof *list, alignof(uint64_t));
    for (uint32_t i = 0; i < count && !r->failed; i++) {
        struct token t;
        if (take_of_type(r, &t, TOKEN_UNSIGNED) && list)
            list[i] = t.number;
    }
    if (!list || count == 0)
        list = NULL;
    memcpy(ret + f->offset, &list, sizeof list);
    memcpy(ret + f->count_offset, &count, sizeof count);
}

static void read_list(struct reader *r, const struct wire_field *f, uint8_t *ret)
{
    uint8_t scratch[256]; /* the measuring pass has nowhere to put an item */
    assert(f->items->bytes <= sizeof scratch);
    uint32_t count = read_list_count(r, f);
    uint8_t *list = f->is_array ? ret + f->offset : take_room(r, count * f->items->bytes, alignof(max_align_t));
    for (uint32_t i = 0; i < count && !r->failed; i++) {
        read_struct(r, f->items, list ? list + i * f->items->bytes : scratch);
        if (r->failed) {
            char place[64];
            snprintf(place, sizeof place, "item %" PRIu32, i);
            put_in_front(r->why, sizeof r->why, place);
        }
    }
    if (!f->is_array) {
        if (count == 0)
            list = NULL;
        memcpy(ret + f->offset, &list, sizeof list);
    }
    memcpy(ret + f->count_offset, &count, sizeof count);
}

static void read_number(struct reader *r, const struct wire_field *f, uint8_t *ret)
{
    struct token t;
    if (!take_of_type(r, &t, TOKEN_UNSIGNED))
        return;
    uint64_t most = f->type == WIRE_U64 ? UINT64_MAX : f->type == WIRE_U32 ? UINT32_MAX : f->max;
    if (t.number > most) {
        fail(r, "%" PRIu64 ", at most %" PRIu64, t.number, most);
        return;
    }
    if (f->type == WIRE_U64) {
        memcpy(ret + f->offset, &t.number, sizeof t.number);
    } else if (f->type == WIRE_U32) {
        uint32_t value = (uint32_t)t.number;
        memcpy(ret + f->offset, &value, sizeof value);
    } else {
        int value = (int)t.number;
        memcpy(ret + f->offset, &value, sizeof value);
    }
}

static void read_f64(struct reader *r, const struct wire_field *f, uint8_t *ret)
{
    struct token t;
    if (!take_token(r, &t))
        return;
    if (t.type == TOKEN_UNSIGNED) /* some packers write 4.0 as 4 */
        t.real = (double)t.number;
    else if (t.type != TOKEN_FLOAT)
        fail(r, "found %s, want a fraction", token_name(t.type));
    memcpy(ret + f->offset, &t.real, sizeof t.real);
}

static void read_bool(struct reader *r, const struct wire_field *f, uint8_t *ret)
{
    struct token t;
    if (!take_of_type(r, &t, TOKEN_BOOL))
        return;
    bool value = t.number != 0;
    memcpy(ret + f->offset, &value, sizeof value);
}

static void read_field(struct reader *r, const struct wire_field *f, uint8_t *ret)
{
    switch (f->type) {
    case WIRE_U32:
    case WIRE_U64:
    case WIRE_ENUM: read_number(r, f, ret); break;
    case WIRE_BOOL: read_bool(r, f, ret); break;
    case WIRE_F64: read_f64(r, f, ret); break;
    case WIRE_TEXT: read_text(r, f, ret); break;
    case WIRE_NUMBERS: read_numbers(r, f, ret); break;
    case WIRE_LIST: read_list(r, f, ret); break;
    }
    if (r->failed)
        put_in_front(r->why, sizeof r->why, f->key);
}

static const struct wire_field *field_find(const struct wire_schema *schema, const struct token *key)
{
    for (uint32_t i = 0; i < schema->field_count; i++) {
        const char *name = schema->fields[i].key;
        if (strlen(name) == key->number && memcmp(name, key->text, key->number) == 0)
            return &schema->fields[i];
    }
    return NULL;
}

static void read_absent(struct reader *r, const struct wire_schema *schema, uint32_t seen, uint8_t *ret)
{
    for (uint32_t i = 0; i < schema->field_count && !r->failed; i++) {
        const struct wire_field *f = &schema->fields[i];
        if (seen >> i & 1)
            continue;
        if (!f->is_optional)
            fail(r, "%s is missing", f->key);
        static const char *const empty = "";
        if (f->type == WIRE_TEXT)
            memcpy(ret + f->offset, &empty, sizeof empty);
    }
}

static void read_struct(struct reader *r, const struct wire_schema *schema, uint8_t *ret)
{
    struct token map, key;
    uint32_t seen = 0;
    assert(schema->field_count <= WIRE_FIELDS_MAX);
    memset(ret, 0, schema->bytes);
    if (!take_of_type(r, &map, TOKEN_MAP))
        return;
    for (uint64_t i = 0; i < map.number && take_of_type(r, &key, TOKEN_TEXT); i++) {
        const struct wire_field *f = field_find(schema, &key);
        if (!f) {
            skip_value(r, 1);
            continue;
        }
        uint32_t bit = 1u << (f - schema->fields);
        if (seen & bit)
            fail(r, "%s stands twice", f->key);
        else
            read_field(r, f, ret);
        seen |= bit;
    }
    read_absent(r, schema, seen, ret);
}

bool wire_decode(const struct wire_schema *schema, const void *data, size_t bytes, void *ret, void **ret_block,
                 char *why, size_t why_bytes)
{
    struct reader r = {.at = data, .end = (const uint8_t *)data + bytes};
    uint8_t *filled = malloc(schema->bytes ? schema->bytes : 1);
    uint8_t *block = NULL;
    bool ok = false;
    if (!filled) {
        fail(&r, "out of memory");
        goto done;
    }
    read_struct(&r, schema, filled);
    if (!r.failed && r.at != r.end)
        fail(&r, "%td bytes are left over", r.end - r.at);
    if (r.failed)
        goto done;
    size_t block_bytes = r.block_bytes;
    block = block_bytes ? malloc(block_bytes) : NULL;
    if (block_bytes && !block) {
        fail(&r, "out of memory for %zu bytes", block_bytes);
        goto done;
    }
    r = (struct reader){.at = data, .end = (const uint8_t *)data + bytes, .block = block};
    read_struct(&r, schema, filled);
    assert(!r.failed);
    assert(r.block_bytes == block_bytes);
    memcpy(ret, filled, schema->bytes);
    *ret_block = block;
    block = NULL;
    ok = true;
done:
    if (!ok)
        snprintf(why, why_bytes, "%s: %s", schema->name, r.why);
    free(block);
    free(filled);
    return ok;
}

/* --- writing by schema ------------------------------------------------------------------------------- */

static bool write_struct(msgpack_packer *p, const struct wire_schema *schema, const uint8_t *from, char *why,
                         size_t why_bytes);

static bool write_text(msgpack_packer *p, const struct wire_field *f, const uint8_t *from, char *why, size_t why_bytes)
{
    const char *text;
    memcpy(&text, from + f->offset, sizeof text);
    size_t bytes = text ? strlen(text) : 0;
    if (bytes > f->max) {
        snprintf(why, why_bytes, "%zu bytes, at most %" PRIu32, bytes, f->max);
        return false;
    }
    size_t fault = text_fault(text, bytes);
    if (fault < bytes) {
        snprintf(why, why_bytes, "byte %zu of %zu is 0x%02x, which is no UTF-8 text", fault, bytes,
                 (unsigned)(uint8_t)text[fault]);
        return false;
    }
    if (msgpack_pack_str(p, bytes) == 0 && msgpack_pack_str_body(p, text ? text : "", bytes) == 0)
        return true;
    snprintf(why, why_bytes, "out of memory");
    return false;
}

static bool write_items(msgpack_packer *p, const struct wire_field *f, const uint8_t *from, char *why, size_t why_bytes)
{
    uint32_t count;
    const uint8_t *list = from + f->offset;
    memcpy(&count, from + f->count_offset, sizeof count);
    if (!f->is_array)
        memcpy(&list, from + f->offset, sizeof list);
    if (count > f->max) {
        snprintf(why, why_bytes, "%" PRIu32 " items, at most %" PRIu32, count, f->max);
        return false;
    }
    bool ok = msgpack_pack_array(p, count) == 0;
    for (uint32_t i = 0; i < count && ok; i++) {
        if (f->type == WIRE_NUMBERS) {
            ok = msgpack_pack_uint64(p, ((const uint64_t *)(const void *)list)[i]) == 0;
        } else if (!write_struct(p, f->items, list + i * f->items->bytes, why, why_bytes)) {
            char place[64];
            snprintf(place, sizeof place, "item %" PRIu32, i);
            put_in_front(why, why_bytes, place);
            return false;
        }
    }
    if (!ok)
        snprintf(why, why_bytes, "out of memory");
    return ok;
}

static int write_number(msgpack_packer *p, const struct wire_field *f, const uint8_t *from)
{
    uint64_t wide;
    uint32_t narrow;
    int choice;
    double real;
    bool truth;
    switch (f->type) {
    case WIRE_U64: memcpy(&wide, from + f->offset, sizeof wide); return msgpack_pack_uint64(p, wide);
    case WIRE_U32: memcpy(&narrow, from + f->offset, sizeof narrow); return msgpack_pack_uint32(p, narrow);
    case WIRE_F64: memcpy(&real, from + f->offset, sizeof real); return msgpack_pack_double(p, real);
    case WIRE_BOOL:
        memcpy(&truth, from + f->offset, sizeof truth);
        return truth ? msgpack_pack_true(p) : msgpack_pack_false(p);
    default:
        memcpy(&choice, from + f->offset, sizeof choice);
        assert(choice >= 0);
        assert((uint32_t)choice <= f->max);
        return msgpack_pack_uint32(p, (uint32_t)choice);
    }
}

static bool write_field(msgpack_packer *p, const struct wire_field *f, const uint8_t *from, char *why, size_t why_bytes)
{
    if (f->type == WIRE_TEXT)
        return write_text(p, f, from, why, why_bytes);
    if (f->type == WIRE_LIST || f->type == WIRE_NUMBERS)
        return write_items(p, f, from, why, why_bytes);
    if (write_number(p, f, from) == 0)
        return true;
    snprintf(why, why_bytes, "out of memory");
    return false;
}

static bool write_struct(msgpack_packer *p, const struct wire_schema *schema, const uint8_t *from, char *why,
                         size_t why_bytes)
{
    if (msgpack_pack_map(p, schema->field_count) != 0) {
        snprintf(why, why_bytes, "out of memory");
        return false;
    }
    for (uint32_t i = 0; i < schema->field_count; i++) {
        const struct wire_field *f = &schema->fields[i];
        size_t key_bytes = strlen(f->key);
        snprintf(why, why_bytes, "out of memory");
        bool ok = msgpack_pack_str(p, key_bytes) == 0 && msgpack_pack_str_body(p, f->key, key_bytes) == 0 &&
                  write_field(p, f, from, why, why_bytes);
        if (!ok) {
            put_in_front(why, why_bytes, f->key);
            return false;
        }
    }
    return true;
}

bool wire_encode(const struct wire_schema *schema, const void *from, void **ret_data, size_t *ret_bytes, char *why,
                 size_t why_bytes)
{
    msgpack_sbuffer buffer;
    msgpack_packer packer;
    msgpack_sbuffer_init(&buffer);
    msgpack_packer_init(&packer, &buffer, msgpack_sbuffer_write);
    if (!write_struct(&packer, schema, from, why, why_bytes)) {
        put_in_front(why, why_bytes, schema->name);
        msgpack_sbuffer_destroy(&buffer);
        return false;
    }
    *ret_bytes = buffer.size;
    *ret_data = msgpack_sbuffer_release(&buffer);
    return true;
}
