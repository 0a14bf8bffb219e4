#include "feed_forward.h"

#include "bindings.h"
#include "layer_norm.h"
#include "matrix_product.h"

namespace vpf {
namespace {

struct FeedForward {
  const float *x, *norm_weight, *norm_bias;
  int64_t row_stride, channels, hidden;
  float eps;
  const Blocks& blocks;
  const Panels &first, &last;
  float* output;
};

// A block of rows goes through the norm, both layers and the residual while it is in the L2 cache.
struct FeedForwardWork {
  explicit FeedForwardWork(const FeedForward& op)
      : op(op), tokens(floats(op.blocks.size * op.channels)), gated(floats(op.blocks.size * op.hidden)) {}

  template <int kWidth>
  VPF_ALWAYS_INLINE void run(int64_t block) {
    const int64_t start = op.blocks.first(block), rows = op.blocks.length(block);
    const float* x = op.x + start * op.row_stride;
    for (int64_t row = 0; row < rows; ++row) {
      layer_norm(x + row * op.row_stride, op.norm_weight, op.norm_bias, op.eps, op.channels,
                 tokens.data() + row * op.channels);
    }
    multiply<kWidth>({{tokens.data(), nullptr, nullptr}, op.channels, rows}, op.first,
                     WriteGated<kWidth>{gated.data(), op.hidden});
    multiply<kWidth>({{gated.data(), nullptr, nullptr}, op.hidden, rows}, op.last,
                     WriteRows<kWidth>{x, op.row_stride, op.output + start * op.channels, op.channels});
  }

  const FeedForward& op;
  std::vector<float> tokens, gated;  // [rows, channels], [rows, hidden]
};

}  // namespace

void feed_forward_cpu(const float* x, const float* norm_weight, const float* norm_bias, const float* weight,
                      const float* bias, const float* out_weight, const float* out_bias, float* output, int64_t rows,
                      int64_t channels, int64_t hidden, int64_t row_stride, double eps, int width, int threads) {
  threads = product_threads(threads, rows, 3 * hidden, channels);
  const Blocks blocks(rows, threads);
  const Panels first(weight, bias, 1, 2 * hidden, channels, true, width, threads);
  const Panels last(out_weight, out_bias, 1, channels, hidden, false, width, threads);
  const FeedForward op = {x,      norm_weight, norm_bias, row_stride, channels, hidden, static_cast<float>(eps),
                          blocks, first,       last,      output};
#pragma omp parallel num_threads(threads)
  {
    FeedForwardWork work(op);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks.count; ++block) run(work, block, width);
  }
}

namespace {

using pybind11::literals::operator""_a;

const Binding binding([](pybind11::module_& m) {
  define(m, "feed_forward_cpu", &feed_forward_cpu, "x"_a, "norm_weight"_a, "norm_bias"_a, "weight"_a, "bias"_a,
         "out_weight"_a, "out_bias"_a, "output"_a, pybind11::kw_only(), "rows"_a, "channels"_a, "hidden"_a,
         "row_stride"_a, "eps"_a, "width"_a, "threads"_a);
});

}  // namespace

}  // namespace vpf
