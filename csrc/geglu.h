// The gated GELU of a feed-forward block. reference.geglu and reference.linear_geglu state the maths.
#pragma once

#include <cstdint>

namespace vpf {

// x: rows of 2 * channels values, `row_stride` apart. output: (rows, channels), contiguous.
void geglu_cpu(const float* x, float* output, int64_t rows, int64_t channels, int64_t row_stride, int threads);

// The same of x weight^T + bias. x: (rows, inputs), its rows so far apart. weight: (2 * channels, inputs), contiguous.
// bias: (2 * channels,) or nullptr. width: floats of a vector, see vector_width().
void linear_geglu_cpu(const float* x, const float* weight, const float* bias, float* output, int64_t rows,
                      int64_t inputs, int64_t channels, int64_t row_stride, int width, int threads);

}  // namespace vpf
