// LayerNorm of one row, for the ops that begin with it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vector_math.h"

namespace vpf {

// Deviations are taken from the mean as float32 rounds it; their own mean then corrects that rounding.
VPF_ALWAYS_INLINE void layer_norm(const float* __restrict x, const float* __restrict weight,
                                  const float* __restrict bias, float eps, int64_t channels, float* __restrict output) {
  const float share = 1.f / static_cast<float>(channels);
  float sum = 0, deviation = 0, square = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < channels; ++c) sum += x[c];
  const float rounded_mean = sum * share;
#pragma omp simd reduction(+ : deviation, square)
  for (int64_t c = 0; c < channels; ++c) {
    const float distance = x[c] - rounded_mean;
    deviation += distance;
    square += distance * distance;
  }
  const float correction = deviation * share;
  const float inverse = 1.f / std::sqrt(std::max(square * share - correction * correction, 0.f) + eps);
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    output[c] = ((x[c] - rounded_mean) - correction) * inverse * weight[c] + bias[c];
  }
}

}  // namespace vpf
