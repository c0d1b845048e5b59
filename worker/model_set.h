/* model_set.h - the models this worker was given, and which of them are open.
 *
 * Each is opened once at start, with a warm-up image, so that a damaged one is found before work is taken. They stay
 * open; when there is no memory for the next one, the one not used for longest is closed. Belongs to the painter
 * thread, except model_set_describe, which reads what no longer changes once model_set_prepare returned. */
#ifndef KILN_MODEL_SET_H
#define KILN_MODEL_SET_H

#include "engine_team.h"
#include "failure.h"
#include "msg.h"
#include "task_inputs.h"

struct model_source { const char *name, *dir; };

struct model {
    char name[MSG_NAME_MAX + 1];
    const char *dir;
    char digest[65], look[65]; /* of the weights; of their files' sizes and times before they were hashed */
    struct engine_info info;
    struct engine_team *engine; /* NULL: closed */
    char *loras;           /* the engine's adapters, as task_inputs_loras writes them, "": none; owned; NULL: not known to be any */
    char *misfit;          /* adapters that do not fit the model or make no picture with it, in the same words; owned; NULL: none known */
    char misfit_why[1024]; /* the engine's sentence about them */
    uint64_t used;         /* higher: used later */
};

struct model_set {
    struct engine_options common; /* without a model and adapters */
    int count;
    struct model models[MSG_MODELS_MAX];
    uint64_t uses;
};

/* model_set_prepare opens, warms up and hashes all. False: why is the sentence of the one that cannot be used. */
bool model_set_prepare(struct model_set *s, const struct model_source *sources, int count,
                       const struct engine_options *common, struct engine_error *why);
void model_set_close(struct model_set *s);

struct model *model_set_find(struct model_set *s, const char *name); /* NULL: not one of ours */
/* model_set_open: afterwards the model is open with the adapters of these inputs and no others (engine_adapt). Adapters that do not
 * fit are read once: the last ones are remembered. */
bool model_set_open(struct model_set *s, struct model *m, const struct task_inputs *in, struct failure *f);

/* model_set_blame: after a picture that is none (BAD_RESULT), do the model's adapters make none at all? Then they are remembered as
 * those that do not fit, and f says so. */
bool model_set_blame(struct model *m, const struct engine_error *why, struct failure *f);
void model_set_describe(const struct model_set *s, struct msg_hello *ret);

/* model_set_look logs when a batch has moved the model's weights (engine_placement.h). */
void model_set_look(struct model *m);

/* model_set_is_unchanged: are the files still those of the digest? Weights are mapped, so a file that is written over under way
 * changes images that would carry the old digest. Files that cannot be looked at (a server away) count as unchanged. */
bool model_set_is_unchanged(const struct model *m);

/* model_set_changed logs that they are others and gives the failure of the tasks under way: they go back, and this process ends.
 * The next one hashes and opens what is there now. */
struct failure model_set_changed(const struct model *m);

/* model_set_allows: may this model be used so? The sentence says which licence stands against it. */
bool model_set_allows(const struct model *m, const char *use, char *why, size_t why_bytes);

#endif
