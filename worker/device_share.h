/* device_share.h - how a farm's workers are laid over the GPUs of a machine: a renderer on each, or a team on each pair.
 *
 * Two GPUs that each hold the model render twice as many pictures as one, without a byte between them; a team renders fewer, but each
 * sooner. So renderers are taken where the model fits one GPU, teams where only a share of it does or where latency is preferred.
 * Who asks has a queue that is deep enough for all workers: a campaign. Memory is that of the whole device, not what is free now: pictures of a team may differ in the last bits from
 * those of one GPU, so a farm that is started again must choose the same. */
#ifndef KILN_DEVICE_SHARE_H
#define KILN_DEVICE_SHARE_H

#include <stdbool.h>
#include <stddef.h>

struct device_share_model { /* engine_fits, for one GPU and for each of two that share it */
    const char *name;
    size_t one_bytes, team_bytes; /* team_bytes 0: two cannot share it evenly */
    bool fits_one, fits_team;
};

/* device_share_is_teams: a team on each pair of so many GPUs? All of the models (1 at least) are served by each worker. memory_bytes: of the
 * smallest GPU. why gets the choice and its reason, "2 renderers, because klein-9b needs 11.5 GB of 16.0". */
bool device_share_is_teams(int gpus, size_t memory_bytes, bool prefers_latency, const struct device_share_model *models, int count,
                           char *why, size_t why_bytes);

#endif
