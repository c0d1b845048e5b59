/* noise.h - torch.randn on the CPU, bit by bit (engine-spec 13.1, 13.2; torch 2.15). */
#ifndef KILN_NOISE_H
#define KILN_NOISE_H

#include <stddef.h>
#include <stdint.h>

/* noise_fill writes what torch.randn(count, generator=manual_seed(seed)) gives in float32; only the low
 * 32 bits of the seed seed mt19937, as in torch. The bf16 pipeline's noise is this, rounded. */
void noise_fill(float *out, size_t count, uint64_t seed);

#endif
