// GroupNorm of channels-last activations, with the time embedding before it and SiLU after it.
// Reference: videopure_fast/ops/group_norm_silu.py.
#pragma once

#include <cstdint>

#include "activations.h"

namespace vpf {

// x: (clips, frames, pixels, channels) with `strides`. output: the same shape, contiguous. weight, bias: (channels,).
// embedding: (clips, channels) or nullptr. Statistics are taken over each frame, or each clip with
// `over_frames`.
void group_norm_silu_cpu(const float* x, const float* weight, const float* bias, const float* embedding, float* output,
                         const ActivationSizes& sizes, const ActivationStrides& strides, int64_t groups, double eps,
                         bool over_frames, bool silu, int threads);

}  // namespace vpf
