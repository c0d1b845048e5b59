/* scheduler.c - sigmas by the empirical shift; mu in double, everything after it in f32 as the reference rounds. */
#include "scheduler.h"

#include <assert.h>
#include <math.h>

static double empirical_mu(int tokens, int steps)
{
    double s = tokens;
    double m200 = 0.00016927 * s + 0.45666666;
    if (tokens > 4300)
        return m200;
    double m10 = 8.73809524e-05 * s + 1.89833333;
    double a = (m200 - m10) / 190.0, b = m200 - 200.0 * a;
    return a * steps + b;
}

void scheduler_plan(struct schedule *s, int steps, int tokens)
{
    assert(steps >= 1 && steps <= ENGINE_STEPS_MAX);
    s->steps = steps;
    s->mu = empirical_mu(tokens, steps);
    float e = (float)exp(s->mu);
    double last = 1.0 / steps;
    double step = steps > 1 ? (last - 1.0) / (steps - 1) : 0;
    for (int i = 0; i < steps; i++) {
        double in = i == steps - 1 && steps > 1 ? last : 1.0 + i * step;
        float sigma = (float)in;
        s->sigma[i] = e / (e + (1.0f / sigma - 1.0f));
        s->timestep[i] = s->sigma[i] * 1000.0f;
    }
    s->sigma[steps] = 0.0f;
}

static float bf16(float x)
{
    return tensor_f32_of(tensor_bf16_of(x));
}

float scheduler_model_time(const struct schedule *s, int step, enum engine_precision precision)
{
    float t = s->timestep[step];
    if (engine_precision_dtype(precision) == TENSOR_F32)
        return t / 1000.0f * 1000.0f;
    return bf16(bf16(bf16(t) / 1000.0f) * 1000.0f);
}
