/* tokenizer.c - Qwen2 byte-level BPE (engine-spec 3).
 *
 *   text ─ cut out special tokens (longest match) ─ NFC ─ split by the pattern ─ per piece: merge bytes
 *
 * A token of the vocabulary is a byte string (the files write it in the GPT-2 byte alphabet), but after loading only two
 * tables are needed: byte to id, and pair of ids to (rank, id of the joined token). Merging a piece keeps its parts in a
 * linked list and the possible merges in a heap by (rank, position), so a piece of n bytes costs n log n. */
#include "tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "model_file.h"

#define FILE_BYTES_MAX (64u << 20)
#define TOKENS_MAX 1000000
#define ID_MAX 4000000
#define SPECIAL_MAX 512
#define MATCH_STEPS_MAX 10000000

static const char pattern[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
                              "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

struct merge {
    uint64_t pair; /* left id << 32 | right id; ~0: empty */
    int32_t rank, id;
};

struct special {
    char *text;
    size_t bytes;
    int32_t id;
};

struct tokenizer {
    int32_t byte_id[256];
    struct merge *merges; /* open addressing, a power of two */
    size_t merge_mask, merge_count;
    struct special specials[SPECIAL_MAX];
    int special_count;
    bool is_special_first[256]; /* some special token begins with this byte */
    int32_t pad_id, vocab_size;
    pcre2_code *code;
};

static bool bad(struct engine_error *why, const char *text)
{
    return engine_error_set(why, ENGINE_BAD_MODEL, "%s", text);
}

/* --- the byte alphabet ------------------------------------------------------------------------------- */

/* Bytes that are printable stand for themselves, the others for U+0100 and up, in order. */
static void byte_alphabet(int32_t codepoint_of[256])
{
    int32_t next = 256;
    for (int b = 0; b < 256; b++) {
        bool is_self = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        codepoint_of[b] = is_self ? b : next++;
    }
}

/* --- loading ----------------------------------------------------------------------------------------- */

static bool read_id(json_t *value, int32_t *ret)
{
    if (!json_is_integer(value) || json_integer_value(value) < 0 || json_integer_value(value) > ID_MAX)
        return false;
    *ret = (int32_t)json_integer_value(value);
    return true;
}

static void note_id(struct tokenizer *t, int32_t id)
{
    if (id + 1 > t->vocab_size)
        t->vocab_size = id + 1;
}

static bool load_bytes(struct tokenizer *t, json_t *vocab, struct engine_error *why)
{
    int32_t codepoint_of[256];
    byte_alphabet(codepoint_of);
    for (int b = 0; b < 256; b++) {
        char key[8] = {0};
        utf8proc_encode_char(codepoint_of[b], (utf8proc_uint8_t *)key);
        if (!read_id(json_object_get(vocab, key), &t->byte_id[b]))
            return engine_error_set(why, ENGINE_BAD_MODEL, "vocab.json: no token for byte %d", b);
    }
    const char *key;
    json_t *value;
    json_object_foreach(vocab, key, value)
    {
        int32_t id = -1;
        if (!read_id(value, &id))
            return engine_error_set(why, ENGINE_BAD_MODEL, "vocab.json: '%.100s' has no usable id, accepted: 0 to %d", key,
                                    ID_MAX);
        note_id(t, id);
    }
    return true;
}

static struct merge *merge_slot(const struct tokenizer *t, uint64_t pair)
{
    uint64_t h = pair * 0x9e3779b97f4a7c15u;
    size_t at = (size_t)(h >> 20) & t->merge_mask;
    while (t->merges[at].pair != pair && t->merges[at].pair != UINT64_MAX)
        at = (at + 1) & t->merge_mask;
    return &t->merges[at];
}

static const struct merge *merge_find(const struct tokenizer *t, int32_t left, int32_t right)
{
    const struct merge *m = merge_slot(t, (uint64_t)(uint32_t)left << 32 | (uint32_t)right);
    return m->pair == UINT64_MAX ? NULL : m;
}

static bool id_of(json_t *vocab, const char *text, size_t bytes, int32_t *ret)
{
    char key[1024];
    if (bytes >= sizeof key)
        return false;
    memcpy(key, text, bytes);
    key[bytes] = 0;
    return read_id(json_object_get(vocab, key), ret);
}

/* One line "LEFT RIGHT": both and their joining must be tokens. */
static bool add_merge(struct tokenizer *t, json_t *vocab, const char *line, size_t bytes, int32_t rank,
                      struct engine_error *why)
{
    const char *space = memchr(line, ' ', bytes);
    char joined[1024];
    int32_t left, right, id;
    size_t first = space ? (size_t)(space - line) : 0, second = space ? bytes - first - 1 : 0;
    if (!space || bytes >= sizeof joined || !first || !second || memchr(space + 1, ' ', second))
        return engine_error_set(why, ENGINE_BAD_MODEL, "merges.txt: merge %d is not two tokens", rank);
    memcpy(joined, line, first);
    memcpy(joined + first, space + 1, second);
    if (!id_of(vocab, line, first, &left) || !id_of(vocab, space + 1, second, &right) ||
        !id_of(vocab, joined, first + second, &id))
        return engine_error_set(why, ENGINE_BAD_MODEL, "merges.txt: merge %d joins what is no token of vocab.json", rank);
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    struct merge *m = merge_slot(t, pair);
    if (m->pair == UINT64_MAX)
        *m = (struct merge){pair, rank, id};
    return true;
}

static bool init_merges(struct tokenizer *t, struct tokenizer_file merges, struct engine_error *why)
{
    size_t lines = 1, slots = 1024;
    for (size_t i = 0; i < merges.bytes; i++)
        lines += merges.text[i] == '\n';
    while (slots < 2 * lines)
        slots *= 2;
    t->merges = malloc(slots * sizeof *t->merges);
    if (!t->merges)
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for %zu merges", lines);
    memset(t->merges, 0xff, slots * sizeof *t->merges);
    t->merge_mask = slots - 1;
    return true;
}

static bool load_merges(struct tokenizer *t, struct tokenizer_file merges, json_t *vocab, struct engine_error *why)
{
    const char *text = merges.text;
    int32_t rank = 0;
    bool ok = init_merges(t, merges, why);
    for (size_t at = 0; ok && at < merges.bytes;) {
        const char *end = memchr(text + at, '\n', merges.bytes - at);
        size_t length = end ? (size_t)(end - text) - at : merges.bytes - at, whole = length;
        if (length && text[at + length - 1] == '\r')
            length--;
        bool is_version = at == 0 && length >= 9 && memcmp(text, "#version:", 9) == 0;
        if (length && !is_version)
            ok = add_merge(t, vocab, text + at, length, rank++, why);
        at += whole + 1;
    }
    t->merge_count = rank;
    return ok;
}

/* Every token but the bytes is made by a merge, so a merges.txt that was cut between two lines shows here and not as
 * prompts that are silently encoded in other words. */
static bool check_merges(const struct tokenizer *t, json_t *vocab, json_t *added_tokens, struct engine_error *why)
{
    size_t made = 0;
    const char *text;
    json_t *value;
    json_object_foreach(vocab, text, value)
        made += json_object_get(added_tokens, text) == NULL;
    made -= made < 256 ? made : 256;
    return t->merge_count >= made ||
           engine_error_set(why, ENGINE_BAD_MODEL, "merges.txt: %zu merges, but vocab.json has %zu tokens that need one",
                            t->merge_count, made);
}

static bool add_special(struct tokenizer *t, const char *text, int32_t id, struct engine_error *why)
{
    if (!*text || t->special_count == SPECIAL_MAX)
        return bad(why, "added_tokens.json: an empty token, or more than 512");
    for (int i = 0; i < t->special_count; i++)
        if (strcmp(t->specials[i].text, text) == 0)
            return t->specials[i].id == id ||
                   engine_error_set(why, ENGINE_BAD_MODEL, "special token '%s' has two ids", text);
    char *copy = strdup(text);
    if (!copy)
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for special tokens");
    t->specials[t->special_count++] = (struct special){copy, strlen(copy), id};
    t->is_special_first[(uint8_t)*copy] = true;
    note_id(t, id);
    return true;
}

static bool load_specials(struct tokenizer *t, json_t *added_tokens, struct engine_error *why)
{
    const char *text;
    json_t *value;
    json_object_foreach(added_tokens, text, value)
    {
        int32_t id;
        if (!read_id(value, &id))
            return engine_error_set(why, ENGINE_BAD_MODEL, "added_tokens.json: '%.100s' has no usable id, accepted: 0 to %d",
                                    text, ID_MAX);
        if (!add_special(t, text, id, why))
            return false;
    }
    return true;
}

static bool special_id(const struct tokenizer *t, const char *text, int32_t *ret, struct engine_error *why)
{
    for (int i = 0; i < t->special_count; i++) {
        if (strcmp(t->specials[i].text, text) == 0) {
            *ret = t->specials[i].id;
            return true;
        }
    }
    return engine_error_set(why, ENGINE_BAD_MODEL, "the special token '%s' is missing", text);
}

static bool compile_pattern(struct tokenizer *t, struct engine_error *why)
{
    int error;
    PCRE2_SIZE at;
    t->code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK, &error,
                            &at, NULL);
    if (!t->code)
        return engine_error_set(why, ENGINE_BAD_MODEL, "the split pattern does not compile (%d)", error);
    pcre2_jit_compile(t->code, PCRE2_JIT_COMPLETE); /* without it, slower */
    return true;
}

static bool load(struct tokenizer *t, json_t *vocab, struct tokenizer_file merges, json_t *added_tokens,
                 struct engine_error *why)
{
    int32_t start_id, end_id; /* the chat template writes them as text: they only have to be there */
    return load_bytes(t, vocab, why) && load_merges(t, merges, vocab, why) && load_specials(t, added_tokens, why) &&
           check_merges(t, vocab, added_tokens, why) &&
           special_id(t, "<|endoftext|>", &t->pad_id, why) && special_id(t, "<|im_start|>", &start_id, why) &&
           special_id(t, "<|im_end|>", &end_id, why) && compile_pattern(t, why);
}

bool tokenizer_parse(struct tokenizer **ret, struct tokenizer_file vocab, struct tokenizer_file merges,
                     struct tokenizer_file added_tokens, struct engine_error *why)
{
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t)
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory for the tokenizer");
    json_t *tokens = model_file_json(vocab.text, vocab.bytes, TOKENS_MAX, "vocab.json", why), *added = NULL;
    bool ok = tokens != NULL;
    ok = ok && (added = model_file_json(added_tokens.text, added_tokens.bytes, TOKENS_MAX, "added_tokens.json", why)) != NULL;
    ok = ok && load(t, tokens, merges, added, why);
    json_decref(tokens);
    json_decref(added);
    if (!ok) {
        tokenizer_close(t);
        return engine_error_at(why, "tokenizer");
    }
    *ret = t;
    return true;
}

bool tokenizer_open(struct tokenizer **ret, const char *tokenizer_dir, struct engine_error *why)
{
    static const char *const names[3] = {"vocab.json", "merges.txt", "added_tokens.json"};
    char path[MODEL_FILE_PATH_MAX], *text[3] = {NULL, NULL, NULL};
    size_t bytes[3] = {0, 0, 0};
    bool ok = true;
    for (int i = 0; i < 3; i++)
        ok = ok && model_file_path(path, tokenizer_dir, names[i], why) &&
             model_file_read(&text[i], &bytes[i], path, FILE_BYTES_MAX, why);
    ok = ok ? tokenizer_parse(ret, (struct tokenizer_file){text[0], bytes[0]}, (struct tokenizer_file){text[1], bytes[1]},
                              (struct tokenizer_file){text[2], bytes[2]}, why)
            : engine_error_at(why, "tokenizer");
    for (int i = 0; i < 3; i++)
        free(text[i]);
    return ok;
}

void tokenizer_close(struct tokenizer *t)
{
    if (!t)
        return;
    for (int i = 0; i < t->special_count; i++)
        free(t->specials[i].text);
    pcre2_code_free(t->code);
    free(t->merges);
    free(t);
}

int32_t tokenizer_pad_id(const struct tokenizer *t)
{
    return t->pad_id;
}

int32_t tokenizer_vocab_size(const struct tokenizer *t)
{
    return t->vocab_size;
}

/* --- merging one piece --------------------------------------------------------------------------------- */

struct candidate {
    int32_t rank, at, id, left, right; /* what it would join: stale when the parts changed meanwhile */
};

struct bench { /* work memory of one encode, sized for the whole text */
    int32_t *id, *previous, *next;
    struct candidate *heap;
    size_t heap_count;
    int32_t *out;
    size_t out_count;
};

static bool is_before(struct candidate a, struct candidate b)
{
    return a.rank != b.rank ? a.rank < b.rank : a.at < b.at;
}

static void heap_push(struct bench *b, struct candidate c)
{
    size_t i = b->heap_count++;
    for (; i && is_before(c, b->heap[(i - 1) / 2]); i = (i - 1) / 2)
        b->heap[i] = b->heap[(i - 1) / 2];
    b->heap[i] = c;
}

static struct candidate heap_pop(struct bench *b)
{
    struct candidate top = b->heap[0], last = b->heap[--b->heap_count];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < b->heap_count; i = child) {
        if (child + 1 < b->heap_count && is_before(b->heap[child + 1], b->heap[child]))
            child++;
        if (!is_before(b->heap[child], last))
            break;
        b->heap[i] = b->heap[child];
    }
    b->heap[i] = last;
    return top;
}

static void propose(const struct tokenizer *t, struct bench *b, int32_t at)
{
    int32_t right = at < 0 ? -1 : b->next[at];
    if (right < 0)
        return;
    const struct merge *m = merge_find(t, b->id[at], b->id[right]);
    if (m)
        heap_push(b, (struct candidate){m->rank, at, m->id, b->id[at], b->id[right]});
}

static void merge_piece(const struct tokenizer *t, struct bench *b, const uint8_t *piece, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        b->id[i] = t->byte_id[piece[i]];
        b->previous[i] = (int32_t)i - 1;
        b->next[i] = i + 1 < bytes ? (int32_t)i + 1 : -1;
    }
    b->heap_count = 0;
    for (size_t i = 0; i + 1 < bytes; i++)
        propose(t, b, (int32_t)i);
    while (b->heap_count) {
        struct candidate c = heap_pop(b);
        int32_t right = b->next[c.at];
        if (b->id[c.at] != c.left || right < 0 || b->id[right] != c.right)
            continue;
        b->id[c.at] = c.id;
        b->id[right] = -1;
        b->next[c.at] = b->next[right];
        if (b->next[right] >= 0)
            b->previous[b->next[right]] = c.at;
        propose(t, b, b->previous[c.at]);
        propose(t, b, c.at);
    }
    for (int32_t i = 0; i >= 0; i = b->next[i])
        b->out[b->out_count++] = b->id[i];
}

/* --- encoding -------------------------------------------------------------------------------------------- */

static bool check_text(const char *text, size_t bytes, struct engine_error *why)
{
    if (bytes > TOKENIZER_PROMPT_BYTES_MAX)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "the text has %zu bytes, accepted: at most %d", bytes,
                                TOKENIZER_PROMPT_BYTES_MAX);
    for (size_t at = 0; at < bytes;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t used = utf8proc_iterate((const utf8proc_uint8_t *)text + at, (utf8proc_ssize_t)(bytes - at), &c);
        if (used <= 0)
            return engine_error_set(why, ENGINE_BAD_REQUEST, "byte %zu of the text is not valid UTF-8", at);
        at += (size_t)used;
    }
    return true;
}

static bool split(const struct tokenizer *t, struct bench *b, const uint8_t *text, size_t bytes, struct engine_error *why)
{
    pcre2_match_data *match = pcre2_match_data_create_from_pattern(t->code, NULL);
    pcre2_match_context *limits = pcre2_match_context_create(NULL);
    bool ok = match && limits;
    if (ok)
        pcre2_set_match_limit(limits, MATCH_STEPS_MAX);
    else
        engine_error_set(why, ENGINE_NO_MEMORY, "no memory to split the text");
    for (size_t at = 0; ok && at < bytes;) {
        int found = pcre2_match(t->code, text, bytes, at, PCRE2_NO_UTF_CHECK, match, limits);
        PCRE2_SIZE *range = pcre2_get_ovector_pointer(match);
        if (found < 0 || range[0] != at || range[1] <= at) { /* every character matches an alternative */
            ok = engine_error_set(why, ENGINE_BAD_REQUEST, "the text cannot be split at byte %zu (%d)", at, found);
            break;
        }
        merge_piece(t, b, text + at, range[1] - at);
        at = range[1];
    }
    pcre2_match_data_free(match);
    pcre2_match_context_free(limits);
    return ok;
}

static bool encode_plain(const struct tokenizer *t, struct bench *b, const char *text, size_t bytes,
                         struct engine_error *why)
{
    if (!bytes)
        return true;
    utf8proc_uint8_t *normal = NULL;
    utf8proc_ssize_t length = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)bytes, &normal,
                                           UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    if (length < 0)
        return engine_error_set(why, ENGINE_BAD_REQUEST, "the text cannot be normalised: %s", utf8proc_errmsg(length));
    bool ok = split(t, b, normal, (size_t)length, why);
    free(normal);
    return ok;
}

static const struct special *special_at(const struct tokenizer *t, const char *text, size_t bytes)
{
    const struct special *best = NULL;
    for (int i = 0; i < t->special_count; i++) {
        const struct special *s = &t->specials[i];
        if (s->bytes <= bytes && memcmp(s->text, text, s->bytes) == 0 && (!best || s->bytes > best->bytes))
            best = s;
    }
    return best;
}

static bool encode_text(const struct tokenizer *t, struct bench *b, const char *text, size_t bytes,
                        struct engine_error *why)
{
    size_t plain = 0;
    for (size_t at = 0; at < bytes;) {
        const struct special *s = t->is_special_first[(uint8_t)text[at]] ? special_at(t, text + at, bytes - at) : NULL;
        if (!s) {
            at++;
            continue;
        }
        if (!encode_plain(t, b, text + plain, at - plain, why))
            return false;
        b->out[b->out_count++] = s->id;
        at += s->bytes;
        plain = at;
    }
    return encode_plain(t, b, text + plain, bytes - plain, why);
}

static void bench_done(struct bench *b)
{
    free(b->id);
    free(b->previous);
    free(b->next);
    free(b->heap);
}

/* NFC can lengthen a text threefold at most (UTF-8, Unicode Standard Annex 15). */
static bool bench_init(struct bench *b, size_t bytes, struct engine_error *why)
{
    size_t n = 3 * bytes + 64;
    *b = (struct bench){.id = malloc(n * 4), .previous = malloc(n * 4), .next = malloc(n * 4),
                        .heap = malloc(3 * n * sizeof *b->heap), .out = malloc(n * 4)};
    if (b->id && b->previous && b->next && b->heap && b->out)
        return true;
    bench_done(b);
    free(b->out);
    return engine_error_set(why, ENGINE_NO_MEMORY, "no memory to encode %zu bytes", bytes);
}

static bool encode(const struct tokenizer *t, const char *text, size_t bytes, int32_t **ret_ids, size_t *ret_count,
                   struct engine_error *why)
{
    struct bench b;
    if (!bench_init(&b, bytes, why))
        return false;
    bool ok = encode_text(t, &b, text, bytes, why);
    bench_done(&b);
    if (!ok) {
        free(b.out);
        return false;
    }
    *ret_ids = b.out;
    *ret_count = b.out_count;
    return true;
}

bool tokenizer_encode(const struct tokenizer *t, const char *text, size_t bytes, int32_t **ret_ids, size_t *ret_count,
                      struct engine_error *why)
{
    return check_text(text, bytes, why) && encode(t, text, bytes, ret_ids, ret_count, why);
}

bool tokenizer_encode_chat(const struct tokenizer *t, const char *prompt, size_t bytes, int32_t **ret_ids,
                           size_t *ret_count, struct engine_error *why)
{
    static const char before[] = "<|im_start|>user\n";
    static const char after[] = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
    if (!check_text(prompt, bytes, why))
        return false;
    size_t total = sizeof before - 1 + bytes + sizeof after - 1;
    char *text = malloc(total);
    if (!text)
        return engine_error_set(why, ENGINE_NO_MEMORY, "no memory to encode %zu bytes", bytes);
    memcpy(text, before, sizeof before - 1);
    memcpy(text + sizeof before - 1, prompt, bytes);
    memcpy(text + sizeof before - 1 + bytes, after, sizeof after - 1);
    bool ok = encode(t, text, total, ret_ids, ret_count, why);
    free(text);
    return ok;
}
