// GroupNorm of channels-last activations, with the time embedding before it and SiLU behind it.
// reference.group_norm_silu states the maths.
#pragma once

#include <cstdint>

#include "activations.h"

namespace vpf {

// x: (clips, frames, pixels, channels). output: the same, contiguous. weight, bias: (channels,).
// embedding: (clips, channels) or nullptr. Statistics are of each frame, or with `over_frames` of each clip.
void group_norm_silu_cpu(const float* x, const float* weight, const float* bias, const float* embedding, float* output,
                         const ActivationSizes& sizes, const ActivationStrides& strides, int64_t groups, double eps,
                         bool over_frames, bool silu, int threads);

}  // namespace vpf
