// Self-attention over the frames of every pixel. reference.temporal_attention and reference.norm_temporal_attention
// state the maths.
#pragma once

#include <cstdint>

#include "activations.h"

namespace vpf {

// qkv: queries, keys and values, `sizes.channels` of each one after another in a pixel; `strides` are qkv's.
// output: of `sizes`, contiguous.
void temporal_attention_cpu(const float* qkv, float* output, const ActivationSizes& sizes,
                            const ActivationStrides& strides, int64_t heads, int threads);

// The same of the queries, keys and values that `weight`, (3 * channels, sizes.channels), makes of LayerNorm(x).
// x: of `sizes`, with these strides. norm_weight, norm_bias: (sizes.channels,). position: (frames, sizes.channels),
// added behind the norm, or nullptr. output: (clips, frames, pixels, channels). All but x are contiguous.
// width: floats of a vector, see vector_width().
void norm_temporal_attention_cpu(const float* x, const float* norm_weight, const float* norm_bias, const float* weight,
                                 const float* position, float* output, const ActivationSizes& sizes,
                                 const ActivationStrides& strides, int64_t channels, int64_t heads, double eps,
                                 int width, int threads);

}  // namespace vpf
