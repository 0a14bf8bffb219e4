// The gated GELU of a feed-forward block. reference.geglu states the maths.
#pragma once

#include <cstdint>

namespace vpf {

// x: rows of 2 * channels values, `row_stride` apart. output: (rows, channels), contiguous.
void geglu_cpu(const float* x, float* output, int64_t rows, int64_t channels, int64_t row_stride, int threads);

}  // namespace vpf
