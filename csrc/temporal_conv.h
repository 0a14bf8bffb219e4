// The (3, 1, 1) convolution over frames, with zeros before the first and after the last, and its residual.
#pragma once

#include <cstdint>

#include "activations.h"

namespace vpf {

// x: of `sizes`, contiguous. weight: (3, outputs, channels), bias: (outputs,), contiguous. residual: (clips, frames,
// pixels, outputs) with these strides, or nullptr. output: the same, contiguous. width: see vector_width().
void temporal_conv_cpu(const float* x, const float* weight, const float* bias, const float* residual, float* output,
                       const ActivationSizes& sizes, const ActivationStrides& residual_strides, int64_t outputs,
                       int width, int threads);

}  // namespace vpf
