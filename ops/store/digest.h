/* digest.h - SHA-256, from libcrypto; the only file that names it.
 *
 * The only thing that can go wrong in hashing memory is that there is no memory for the state: then the
 * functions return false and the result is all zeros, which equals no real digest. */
#ifndef KILN_DIGEST_H
#define KILN_DIGEST_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct digest;
struct digest *digest_new(void); /* NULL when out of memory; the functions below accept that NULL */
void digest_add(struct digest *d, const void *data, size_t bytes);
bool digest_done(struct digest *d, uint8_t ret[32]); /* and frees */
void digest_hex(const uint8_t *bytes, size_t count, char *ret); /* 2 * count + 1 */
bool digest_bytes(const void *data, size_t bytes, uint8_t ret[32]);
bool digest_of(const void *data, size_t bytes, char ret_hex[65]);
/* digest_file: of a regular file; a pipe, a device or a folder is refused before anything is read. */
bool digest_file(const char *path, char ret_hex[65], uint64_t *ret_bytes, char *why, size_t why_bytes);
/* digest_stop_when: a file that this thread hashes is given up, with a sentence, once *flag is set; NULL: never. */
void digest_stop_when(const atomic_bool *flag);
/* digest_model: of every *.json, *.txt, *.safetensors, *.gguf of a model folder and its parts (the folders directly in it): the SHA-256
 * of what `sha256sum` prints for them, sorted by relative path. It is the weights digest that images carry. */
bool digest_model(const char *model_dir, char ret_hex[65], char *why, size_t why_bytes);
/* digest_model_without: the same without the parts of a list that ends with NULL (a folder "vae", or "vae.safetensors"). */
bool digest_model_without(const char *model_dir, const char *const *parts, char ret_hex[65], char *why, size_t why_bytes);
/* digest_model_look: over name, size, inode and time of change of the same files. Quick; another value says that the files are not
 * those that were looked at before. False: they cannot be looked at now, which says nothing about them. */
bool digest_model_look(const char *model_dir, char ret_hex[65], char *why, size_t why_bytes);

#endif
