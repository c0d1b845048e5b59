/* fuzz_tokenizer.c - any vocabulary is usable or refused with a sentence, any text is ids of the vocabulary or refused.
 *
 * The input is four parts with a byte 0xff between them: text, vocab.json, merges.txt, added_tokens.json. Parts that are
 * not there are taken from a small tokenizer of our own, so that most inputs reach the encoder. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "../unit/byte_vocabulary.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char own_merges[] = "#version: 0.2\na b\nab c\n\xc4\xa0 a\n\xc3\x8c \xc4\xa3\ne \xc3\x8c\xc4\xa3\n";
static const char own_added[] = "{\"<|endoftext|>\":300,\"<|im_start|>\":301,\"<|im_end|>\":302,\"<think>\":303,\"<th\":304}";

static void must(bool condition)
{
    if (!condition)
        abort();
}

/* The 256 bytes, and what own_merges makes. */
static const char *own_vocab(void)
{
    static char text[BYTE_VOCABULARY_MAX];
    if (!*text)
        byte_vocabulary(text, ",\"\xc4\xa0\x61\":258,\"\xc3\x8c\xc4\xa3\":259,\"e\xc3\x8c\xc4\xa3\":260");
    return text;
}

/* Cuts the next part off; NULL when there is none. */
static struct tokenizer_file part(const uint8_t **at, size_t *left, const char *own)
{
    if (!*at)
        return (struct tokenizer_file){own, strlen(own)};
    const uint8_t *end = memchr(*at, 0xff, *left);
    struct tokenizer_file f = {(const char *)*at, end ? (size_t)(end - *at) : *left};
    *left = end ? *left - f.bytes - 1 : 0;
    *at = end ? end + 1 : NULL;
    return f;
}

static void check_ids(const struct tokenizer *t, bool ok, int32_t *ids, size_t count, const struct engine_error *why)
{
    if (!ok) {
        must(why->text[0] && why->fault == ENGINE_BAD_REQUEST);
        return;
    }
    for (size_t i = 0; i < count; i++)
        must(ids[i] >= 0 && ids[i] < tokenizer_vocab_size(t));
    free(ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *at = size ? data : (const uint8_t *)"";
    size_t left = size, count = 0;
    struct tokenizer_file text = part(&at, &left, ""), vocab = part(&at, &left, own_vocab());
    struct tokenizer_file merges = part(&at, &left, own_merges), added = part(&at, &left, own_added);
    struct tokenizer *t;
    struct engine_error why = {0};
    int32_t *ids = NULL;
    if (!tokenizer_parse(&t, vocab, merges, added, &why)) {
        must(why.text[0] && why.fault == ENGINE_BAD_MODEL);
        must(size && memchr(data, 0xff, size)); /* our own files are good */
        return 0;
    }
    must(tokenizer_pad_id(t) < tokenizer_vocab_size(t));
    bool ok = tokenizer_encode(t, text.text, text.bytes, &ids, &count, &why);
    check_ids(t, ok, ids, count, &why);
    ok = tokenizer_encode_chat(t, text.text, text.bytes, &ids, &count, &why);
    must(!ok || count >= 3);
    check_ids(t, ok, ids, count, &why);
    tokenizer_close(t);
    return 0;
}
