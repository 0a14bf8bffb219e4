// A linear layer and the residual it is added to. Reference: videopure_fast/ops/linear_residual.py.
#pragma once

#include <cstdint>

namespace vpf {

// x: (rows, inputs), residual: (rows, outputs), with row_stride and residual_stride elements between rows. weight:
// (outputs, inputs), contiguous. bias: (outputs,) or nullptr. output: (rows, outputs), contiguous. width: floats per
// vector, up to vector_width().
void linear_residual_cpu(const float* x, const float* weight, const float* bias, const float* residual, float* output,
                         int64_t rows, int64_t inputs, int64_t outputs, int64_t row_stride, int64_t residual_stride,
                         int width, int threads);

}  // namespace vpf
