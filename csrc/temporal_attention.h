// Self-attention over the frames of every pixel.
// References: videopure_fast/ops/temporal_attention.py and norm_temporal_attention.py.
#pragma once

#include <cstdint>

#include "activations.h"

namespace vpf {

// qkv: (clips, frames, pixels, 3 * channels) with `strides`: queries, keys and values one after another.
// output: `sizes`, contiguous.
void temporal_attention_cpu(const float* qkv, float* output, const ActivationSizes& sizes,
                            const ActivationStrides& strides, int64_t heads, int threads);

// Attention of the queries, keys and values LayerNorm(x) weight^T. x: `sizes`, with `strides`. weight:
// (3 * channels, sizes.channels). norm_weight, norm_bias: (sizes.channels,). position: (frames, sizes.channels), added
// after the norm, or nullptr. output: (clips, frames, pixels, channels). All but x are contiguous. width: floats per
// vector, up to vector_width().
void norm_temporal_attention_cpu(const float* x, const float* norm_weight, const float* norm_bias, const float* weight,
                                 const float* position, float* output, const ActivationSizes& sizes,
                                 const ActivationStrides& strides, int64_t channels, int64_t heads, double eps,
                                 int width, int threads);

}  // namespace vpf
