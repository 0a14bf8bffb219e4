// Self-attention over the frames of every pixel. reference.temporal_attention states the maths.
#pragma once

#include <cstdint>

#include "activations.h"

namespace vpf {

// qkv: queries, keys and values, `sizes.channels` of each one after another in a pixel; `strides` are qkv's.
// output: of `sizes`, contiguous.
void temporal_attention_cpu(const float* qkv, float* output, const ActivationSizes& sizes,
                            const ActivationStrides& strides, int64_t heads, int threads);

}  // namespace vpf
