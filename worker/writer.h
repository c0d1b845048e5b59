/* writer.h - the thread that turns pixels into files, while the next batch is rendered.
 *
 *   image:   encode, stage (fsync, SHA-256), spool record (fsync), outcome to the I/O thread
 *   answer:  publish or discard the staged file, remove the record, outcome
 *
 * A disk that is full, read-only or not mounted is no fault of the task: its bytes are kept, `blocked` names the
 * folder, no new work is taken, and every few seconds it is tried again. What is kept is bounded by the credit. */
#ifndef KILN_WRITER_H
#define KILN_WRITER_H

#include "batch.h"
#include "engine.h"

struct writer;

struct writer_options {
    const char *spool_dir;     /* borrowed */
    const char *precision;     /* for the record inside images */
    struct mailbox *outcomes;  /* where results go */
};
bool writer_open(struct writer **ret, const struct writer_options *options, char *why, size_t why_bytes);
/* writer_close finishes what can be written now and ends the thread. What is blocked is dropped: never reported, so
 * its lease runs out and it is made again. */
void writer_close(struct writer *w);

/* writer_image takes the pixels over. digest and licence outlive the batch. */
void writer_image(struct writer *w, struct batch *b, uint32_t index, struct engine_image *image, const char *digest,
                  const char *licence, double render_s);
void writer_settle(struct writer *w, const struct spool_entry *e);      /* e->verdict says which */
bool writer_blocked(struct writer *w, char *ret_text, size_t bytes);    /* "no space in /data/images/a" */

#endif
