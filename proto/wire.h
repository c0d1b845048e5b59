/* wire.h - structs to msgpack and back, told by a table: the schema of a message is data, not code.
 *
 *   static const struct wire_field ready_fields[] = {
 *       {.key = "credit", .type = WIRE_U32, .offset = offsetof(struct msg_ready, credit)}, ..
 *
 * A struct travels as a map with string keys; a list as an array. The same table drives both directions, so a
 * field cannot be written one way and read another. Reading: unknown keys are skipped (nested at most
 * WIRE_DEPTH_MAX deep), a missing or doubled key is an error, every size is checked before memory is asked
 * for, texts are UTF-8 without NUL. Writing obeys the same limits: what we send can be read. */
#ifndef KILN_WIRE_H
#define KILN_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WIRE_DEPTH_MAX 8
#define WIRE_FIELDS_MAX 32

enum wire_type {
    WIRE_U32,
    WIRE_U64,
    WIRE_BOOL,
    WIRE_F64,     /* any double, NaN too */
    WIRE_ENUM,    /* an int from 0 to max */
    WIRE_TEXT,    /* const char *, at most max bytes; NULL is written as "" and never read */
    WIRE_NUMBERS, /* uint64_t *, at most max of them */
    WIRE_LIST,    /* structs of `items`, at most max of them */
};

struct wire_schema;
struct wire_field {
    const char *key;
    enum wire_type type;
    size_t offset;                   /* of the member */
    size_t count_offset;             /* lists: of the uint32_t that counts them */
    uint32_t max;                    /* bytes of a text, items of a list, largest value of an enum */
    const struct wire_schema *items; /* WIRE_LIST */
    bool is_array;                   /* WIRE_LIST: the member is an array of max structs, not a pointer */
    bool is_optional;                /* absent: zero, or the text "" */
};
struct wire_schema {
    const char *name; /* opens every sentence about it */
    size_t bytes;     /* of the struct */
    uint32_t field_count;
    const struct wire_field *fields;
};

/* wire_decode fills ret (schema->bytes of it) from a whole msgpack map. Texts and lists live in *ret_block, which
 * the caller frees. False: ret and *ret_block are untouched and why says which field and what was found. */
bool wire_decode(const struct wire_schema *schema, const void *data, size_t bytes, void *ret, void **ret_block,
                 char *why, size_t why_bytes);
/* wire_encode writes from into a malloc'ed buffer. */
bool wire_encode(const struct wire_schema *schema, const void *from, void **ret_data, size_t *ret_bytes, char *why,
                 size_t why_bytes);

#endif
