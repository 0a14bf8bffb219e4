// The gated GELU of a feed-forward block. References: videopure_fast/ops/geglu.py and linear_geglu.py.
#pragma once

#include <cstdint>

namespace vpf {

// x: (rows, 2 * channels), `row_stride` elements between rows. output: (rows, channels), contiguous.
void geglu_cpu(const float* x, float* output, int64_t rows, int64_t channels, int64_t row_stride, int threads);

// geglu of x weight^T + bias. x: (rows, inputs), `row_stride` elements between rows. weight: (2 * channels, inputs),
// contiguous. bias: (2 * channels,) or nullptr. width: floats per vector, up to vector_width().
void linear_geglu_cpu(const float* x, const float* weight, const float* bias, float* output, int64_t rows,
                      int64_t inputs, int64_t channels, int64_t row_stride, int width, int threads);

}  // namespace vpf
