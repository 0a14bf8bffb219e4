// The (3, 1, 1) convolution over frames, with zeros before the first and after the last, and its residual.
// Reference: videopure_fast/ops/temporal_conv.py, whose norm and activation come first (group_norm_silu).
#pragma once

#include <cstdint>

#include "activations.h"

namespace vpf {

// x: `sizes`, contiguous. weight: (3, outputs, channels), bias: (outputs,), contiguous. residual: (clips, frames,
// pixels, outputs) with residual_strides, or nullptr. output: (clips, frames, pixels, outputs), contiguous. width:
// floats per vector, up to vector_width().
void temporal_conv_cpu(const float* x, const float* weight, const float* bias, const float* residual, float* output,
                       const ActivationSizes& sizes, const ActivationStrides& residual_strides, int64_t outputs,
                       int width, int threads);

}  // namespace vpf
