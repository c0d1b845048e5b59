/* dry.h - `kiln-worker render --device dry:NAME`: the phases of a run on a dry device (kern_dry.h), and what its ledger
 * says of them. Everything is computed, nothing measured: the report says so. */
#ifndef KILN_DRY_H
#define KILN_DRY_H

#include "engine.h"

struct dry;

bool dry_is(const char *device); /* "dry:NAME"; accepts NULL */

/* dry_open before the engine is opened: what that does is the first phase, load. trace: a file that gets a line of JSON for
 * each operation, or NULL. False: then why says what to do. */
bool dry_open(struct dry **ret, const char *trace, char *why, size_t why_bytes);
void dry_close(struct dry *d); /* accepts NULL */

/* dry_phase ends the phase before and begins this one; a batch is PROMPT, STEP for each step, DECODE, and IDLE behind it. */
enum dry_phase { DRY_LOAD, DRY_PROMPT, DRY_STEP, DRY_DECODE, DRY_IDLE, DRY_PHASES };
void dry_phase(struct dry *d, enum dry_phase phase);

/* dry_report prints the ledger to stdout, as JSON or as a page; model: the options the engine was opened with; request: any of
 * the pictures, all of one shape. False: the model does not fit the device, or cannot be read, and why says it. */
bool dry_report(const struct dry *d, const struct engine_options *model, const struct engine_request *request, int pictures,
                const struct engine_info *info, bool is_json, char *why, size_t why_bytes);

#endif
