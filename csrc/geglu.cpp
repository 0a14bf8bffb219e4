#include "geglu.h"

#include "activations.h"
#include "bindings.h"
#include "matrix_product.h"
#include "vector_math.h"

namespace vpf {
namespace {

VPF_VECTOR_CLONES void geglu_row(const float* __restrict values, float* __restrict output, int64_t channels) {
  const float* gate = values + channels;
  for (int64_t c = 0; c < channels; ++c) output[c] = values[c] * gelu(gate[c]);
}

struct LinearGeglu {
  template <int kWidth>
  VPF_ALWAYS_INLINE void run(int64_t block) const {
    const int64_t first = blocks.first(block);
    const WriteGated<kWidth> write = {output + first * channels, channels};
    multiply<kWidth>({{x + first * row_stride, nullptr, nullptr}, row_stride, blocks.length(block)}, panels, write);
  }

  const Blocks& blocks;
  const Panels& panels;
  const float* x;
  int64_t row_stride;
  float* output;
  int64_t channels;
};

}  // namespace

void geglu_cpu(const float* x, float* output, int64_t rows, int64_t channels, int64_t row_stride, int threads) {
  const int64_t values = rows * channels;
#pragma omp parallel for schedule(static) num_threads(useful_threads(threads, values))
  for (int64_t row = 0; row < rows; ++row) geglu_row(x + row * row_stride, output + row * channels, channels);
}

void linear_geglu_cpu(const float* x, const float* weight, const float* bias, float* output, int64_t rows,
                      int64_t inputs, int64_t channels, int64_t row_stride, int width, int threads) {
  threads = product_threads(threads, rows, 2 * channels, inputs);
  const Blocks blocks(rows, threads);
  const Panels panels(weight, bias, 1, 2 * channels, inputs, true, width, threads);
  const LinearGeglu work = {blocks, panels, x, row_stride, output, channels};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks.count; ++block) run(work, block, width);
}

namespace {

using pybind11::literals::operator""_a;

const Binding binding([](pybind11::module_& m) {
  define(m, "geglu_cpu", &geglu_cpu, "x"_a, "output"_a, pybind11::kw_only(), "rows"_a, "channels"_a, "row_stride"_a,
         "threads"_a);
  define(m, "linear_geglu_cpu", &linear_geglu_cpu, "x"_a, "weight"_a, "bias"_a, "output"_a, pybind11::kw_only(),
         "rows"_a, "inputs"_a, "channels"_a, "row_stride"_a, "width"_a, "threads"_a);
});

}  // namespace

}  // namespace vpf
