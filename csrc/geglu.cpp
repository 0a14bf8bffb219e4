#include "geglu.h"

#include "activations.h"
#include "vector_math.h"

namespace vpf {
namespace {

VPF_VECTOR_CLONES void geglu_row(const float* __restrict values, float* __restrict output, int64_t channels) {
  const float* gate = values + channels;
  for (int64_t c = 0; c < channels; ++c) output[c] = values[c] * gelu(gate[c]);
}

}  // namespace

void geglu_cpu(const float* x, float* output, int64_t rows, int64_t channels, int64_t row_stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(useful_threads(threads, rows * channels))
  for (int64_t row = 0; row < rows; ++row) geglu_row(x + row * row_stride, output + row * channels, channels);
}

}  // namespace vpf
