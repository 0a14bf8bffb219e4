#include "matrix_product.h"

namespace vpf {
namespace {

constexpr int64_t kMultiplyAddsPerValue = 32;  // take as long as one value of an elementwise op

int64_t panels_of(int64_t outputs, int64_t width) { return (outputs + width - 1) / width; }

}  // namespace

int vector_width() {
#if defined(__GNUC__) && defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return 16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

int product_threads(int threads, int64_t rows, int64_t outputs, int64_t inputs) {
  return useful_threads(threads, rows * outputs * inputs / kMultiplyAddsPerValue);
}

Panels::Panels(const float* weight, const float* bias, int64_t taps, int64_t outputs, int64_t inputs, bool gated,
               int width, int threads)
    : inputs(inputs),
      width(width),
      count(gated ? panels_of(outputs / 2, width) : panels_of(outputs, 2 * width)),
      weights(floats(taps * count * inputs * 2 * width)),
      biases(floats(count * 2 * width)) {
  const int64_t half = gated ? outputs / 2 : width, step = gated ? width : 2 * width;
#pragma omp parallel for schedule(static) num_threads(useful_threads(threads, taps * outputs * inputs))
  for (int64_t panel = 0; panel < taps * count; ++panel) {
    const int64_t tap = panel / count, first = panel % count * step;
    for (int64_t lane = 0; lane < 2 * width; ++lane) {
      const int64_t within = first + lane % width, output = within + lane / width * half;
      if ((gated ? within >= half : output >= outputs)) continue;
      const float* from = weight + (tap * outputs + output) * inputs;
      float* to = weights.data() + panel * inputs * 2 * width + lane;
      for (int64_t k = 0; k < inputs; ++k) to[k * 2 * width] = from[k];
      if (bias && tap == 0) biases[static_cast<std::size_t>(panel * 2 * width + lane)] = bias[output];
    }
  }
}

Blocks::Blocks(int64_t rows, int threads) : rows(rows) {
  constexpr int64_t kWhole = 12;  // rows of the largest tile of multiply()
  const int64_t share = (rows + threads - 1) / threads;
  size = std::min(kBlockRows, (share + kWhole - 1) / kWhole * kWhole);
  count = (rows + size - 1) / size;
}

}  // namespace vpf
