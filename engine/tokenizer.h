/* tokenizer.h - Qwen2 byte-level BPE: text to ids, exactly as the reference tokenizer (engine-spec 3).
 *
 * Reads tokenizer/{vocab.json, merges.txt, added_tokens.json}; tokenizer.json holds the same again. Special tokens
 * are cut out of the raw text first; the rest is NFC (utf8proc), split by the Qwen2 pattern (PCRE2), merged. */
#ifndef KILN_TOKENIZER_H
#define KILN_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#include "engine_error.h"

#define TOKENIZER_PROMPT_BYTES_MAX 65536

struct tokenizer;

bool tokenizer_open(struct tokenizer **ret, const char *tokenizer_dir, struct engine_error *why);
/* tokenizer_parse: the same from the three files' texts, for the fuzzer. */
struct tokenizer_file { const char *text; size_t bytes; };
bool tokenizer_parse(struct tokenizer **ret, struct tokenizer_file vocab, struct tokenizer_file merges,
                     struct tokenizer_file added_tokens, struct engine_error *why);
void tokenizer_close(struct tokenizer *t); /* accepts NULL */

/* tokenizer_encode: the text alone. *ret_ids is malloc'ed, the caller frees. Invalid UTF-8 or more than
 * TOKENIZER_PROMPT_BYTES_MAX bytes is an ENGINE_BAD_REQUEST that says where; NUL is a character like any other. */
bool tokenizer_encode(const struct tokenizer *t, const char *text, size_t bytes, int32_t **ret_ids, size_t *ret_count,
                      struct engine_error *why);
/* tokenizer_encode_chat: with the chat template around it, unpadded (engine-spec 3, enable_thinking=False). */
bool tokenizer_encode_chat(const struct tokenizer *t, const char *prompt, size_t bytes, int32_t **ret_ids,
                           size_t *ret_count, struct engine_error *why);
int32_t tokenizer_pad_id(const struct tokenizer *t);   /* <|endoftext|> */
int32_t tokenizer_vocab_size(const struct tokenizer *t); /* highest id + 1 */

#endif
