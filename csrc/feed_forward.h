// A feed-forward block with its norm and residual. Reference: videopure_fast/ops/feed_forward.py.
#pragma once

#include <cstdint>

namespace vpf {

// x: (rows, channels), `row_stride` elements between rows. norm_weight, norm_bias, out_bias: (channels,). weight:
// (2 * hidden, channels). bias: (2 * hidden,). out_weight: (channels, hidden). output: (rows, channels). All but x are
// contiguous. width: floats per vector, up to vector_width().
void feed_forward_cpu(const float* x, const float* norm_weight, const float* norm_bias, const float* weight,
                      const float* bias, const float* out_weight, const float* out_bias, float* output, int64_t rows,
                      int64_t channels, int64_t hidden, int64_t row_stride, double eps, int width, int threads);

}  // namespace vpf
