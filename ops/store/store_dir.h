/* store_dir.h - a folder of images where a file is either official or not there.
 *
 *   OUT/.staging/TASK-TOKEN   written, fsynced, hashed; not official
 *   OUT/FILE                  official: renamed after the database committed (never over another file)
 *
 * If a process dies between commit and publish, the staged file is still there; the janitor asks the database
 * (committed: publish it; stale: remove it). Every step may run twice. ENOSPC, EROFS, ENOENT are told apart:
 * they stop the work, not the task. */
#ifndef KILN_STORE_DIR_H
#define KILN_STORE_DIR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum store_fault { STORE_OK, STORE_FULL, STORE_READ_ONLY, STORE_MISSING, STORE_DENIED, STORE_IO, STORE_EXISTS };
struct store_error { enum store_fault fault; char text[1024]; };

bool store_dir_prepare(const char *out_dir, bool create, struct store_error *why); /* exists, is writable, .staging is there */
bool store_dir_stage(const char *out_dir, uint64_t task, uint64_t token, const void *data, size_t bytes,
                     char ret_sha256[65], struct store_error *why);
bool store_dir_publish(const char *out_dir, uint64_t task, uint64_t token, const char *file, struct store_error *why);
bool store_dir_discard(const char *out_dir, uint64_t task, uint64_t token, struct store_error *why); /* absent: fine */
/* store_dir_staged calls each staged file, with its age by modification time. */
bool store_dir_staged(const char *out_dir, bool (*each)(void *, uint64_t task, uint64_t token, double age_s), void *context,
                      struct store_error *why);
/* store_dir_file_name: "NAME-KEY8.png" or "000012-01-KEY8.png" (variation only when there are several). */
void store_dir_file_name(char *ret, size_t bytes, const char *name, int row, int variation, int variations,
                         const uint8_t key[16], const char *format);
int store_dir_move(const char *from, const char *to); /* within a folder, never over another file; 0 or an errno */
bool store_dir_file_ok(const char *file); /* a plain name: no '/', no leading '.', printable */

#endif
