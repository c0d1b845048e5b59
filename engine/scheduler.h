/* scheduler.h - flow-matching Euler with the empirical shift (engine-spec 6.1). */
#ifndef KILN_SCHEDULER_H
#define KILN_SCHEDULER_H

#include "engine.h"

struct schedule {
    int steps;
    double mu;
    float sigma[ENGINE_STEPS_MAX + 1];    /* the last is 0 */
    float timestep[ENGINE_STEPS_MAX];     /* 1000 * sigma */
};

/* scheduler_plan fills the schedule for an image of `tokens` = (w/16) * (h/16) output tokens. */
void scheduler_plan(struct schedule *s, int steps, int tokens);

/* scheduler_model_time: what the transformer's time embedding sees at step i in this precision: f32 keeps
 * 1000 * (t / 1000); bf16 rounds t, t/1000 and the product (engine-spec 5.1). */
float scheduler_model_time(const struct schedule *s, int step, enum engine_precision precision);

#endif
