/* janitor_disk.h - looks at campaign folders in a thread of its own: a folder on a server that hangs must not stop the
 * farm. One job at a time; the caller asks now and then whether it is over. */
#ifndef KILN_JANITOR_DISK_H
#define KILN_JANITOR_DISK_H

#include <stdbool.h>
#include <stdint.h>

#define JANITOR_DISK_FILES_MAX 256 /* in one job */

enum janitor_disk_verdict { JANITOR_DISK_LEAVE, JANITOR_DISK_PUBLISH, JANITOR_DISK_DISCARD };
struct janitor_disk_file { uint64_t task, token; enum janitor_disk_verdict verdict; char file[256]; };

struct janitor_disk;
/* age_s: younger files are not looked at, their workers are about to speak of them. done: called in the thread for each file
 * that was published or discarded, or could not be (why). */
typedef void (*janitor_disk_done)(const char *folder, const struct janitor_disk_file *file, const char *why);
bool janitor_disk_open(struct janitor_disk **ret, double age_s, janitor_disk_done done);
void janitor_disk_close(struct janitor_disk *d); /* a thread that hangs in the disk is left behind */

bool janitor_disk_is_busy(struct janitor_disk *d);
void janitor_disk_list(struct janitor_disk *d, const char *folder);
void janitor_disk_settle(struct janitor_disk *d, const char *folder, const struct janitor_disk_file *files, int count);
/* janitor_disk_files: what the last list found; is_whole false: there were more. */
int janitor_disk_files(struct janitor_disk *d, struct janitor_disk_file *ret, bool *is_whole);

#endif
