/* digest.h - SHA-256, from libcrypto; the only file that names it. */
#ifndef KILN_DIGEST_H
#define KILN_DIGEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct digest;
struct digest *digest_new(void);
void digest_add(struct digest *d, const void *data, size_t bytes);
void digest_done(struct digest *d, uint8_t ret[32]); /* and frees */
void digest_hex(const uint8_t *bytes, size_t count, char *ret); /* 2 * count + 1 */
void digest_of(const void *data, size_t bytes, char ret_hex[65]);
bool digest_file(const char *path, char ret_hex[65], uint64_t *ret_bytes, char *why, size_t why_bytes);
/* digest_model: over name, size and content of every *.json, *.txt, *.safetensors of a model folder's parts, sorted:
 * the weights digest that images carry. */
bool digest_model(const char *model_dir, char ret_hex[65], char *why, size_t why_bytes);

#endif
