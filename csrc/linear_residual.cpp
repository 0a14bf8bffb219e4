#include "linear_residual.h"

#include "bindings.h"
#include "matrix_product.h"

namespace vpf {
namespace {

struct LinearResidual {
  template <int kWidth>
  VPF_ALWAYS_INLINE void run(int64_t block) const {
    const int64_t first = blocks.first(block);
    const WriteRows<kWidth> write = {residual + first * residual_stride, residual_stride, output + first * outputs,
                                     outputs};
    multiply<kWidth>({{x + first * row_stride, nullptr, nullptr}, row_stride, blocks.length(block)}, panels, write);
  }

  const Blocks& blocks;
  const Panels& panels;
  const float *x, *residual;
  int64_t row_stride, residual_stride;
  float* output;
  int64_t outputs;
};

}  // namespace

void linear_residual_cpu(const float* x, const float* weight, const float* bias, const float* residual, float* output,
                         int64_t rows, int64_t inputs, int64_t outputs, int64_t row_stride, int64_t residual_stride,
                         int width, int threads) {
  threads = product_threads(threads, rows, outputs, inputs);
  const Blocks blocks(rows, threads);
  const Panels panels(weight, bias, 1, outputs, inputs, false, width, threads);
  const LinearResidual work = {blocks, panels, x, residual, row_stride, residual_stride, output, outputs};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks.count; ++block) run(work, block, width);
}

namespace {

using pybind11::literals::operator""_a;

const Binding binding([](pybind11::module_& m) {
  define(m, "linear_residual_cpu", &linear_residual_cpu, "x"_a, "weight"_a, "bias"_a, "residual"_a, "output"_a,
         pybind11::kw_only(), "rows"_a, "inputs"_a, "outputs"_a, "row_stride"_a, "residual_stride"_a, "width"_a,
         "threads"_a);
});

}  // namespace

}  // namespace vpf
