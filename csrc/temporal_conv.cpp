#include "temporal_conv.h"

#include "bindings.h"
#include "matrix_product.h"

namespace vpf {
namespace {

// One block of pixels of one frame: the frames before, at and after it are multiplied by the three taps' weights.
struct TemporalConv {
  template <int kWidth>
  VPF_ALWAYS_INLINE void run(int64_t i) const {
    const int64_t image = i / blocks.count, block = i % blocks.count;
    const int64_t clip = image / sizes.frames, frame = image % sizes.frames, pixel = blocks.first(block);
    const int64_t channels = sizes.channels, frame_size = sizes.pixels * channels;
    const float* at = x + image * frame_size + pixel * channels;
    const RowBlock rows = {
        {frame > 0 ? at - frame_size : nullptr, at, frame + 1 < sizes.frames ? at + frame_size : nullptr},
        channels,
        blocks.length(block)};
    const ActivationStrides& s = residual_strides;
    const WriteRows<kWidth> write = {residual ? residual + clip * s.clip + frame * s.frame + pixel * s.pixel : nullptr,
                                     s.pixel, output + (image * sizes.pixels + pixel) * outputs, outputs};
    multiply<kWidth>(rows, panels, write);
  }

  const Blocks& blocks;  // of the pixels of a frame
  const Panels& panels;
  const ActivationSizes& sizes;
  const float *x, *residual;
  const ActivationStrides& residual_strides;
  float* output;
  int64_t outputs;
};

}  // namespace

void temporal_conv_cpu(const float* x, const float* weight, const float* bias, const float* residual, float* output,
                       const ActivationSizes& sizes, const ActivationStrides& residual_strides, int64_t outputs,
                       int width, int threads) {
  const int64_t images = sizes.clips * sizes.frames;
  threads = product_threads(threads, images * sizes.pixels, outputs, 3 * sizes.channels);
  const Blocks blocks(sizes.pixels, static_cast<int>((threads + images - 1) / images));
  const Panels panels(weight, bias, 3, outputs, sizes.channels, false, width, threads);
  const TemporalConv work = {blocks, panels, sizes, x, residual, residual_strides, output, outputs};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < images * blocks.count; ++i) run(work, i, width);
}

namespace {

using pybind11::literals::operator""_a;

const Binding binding([](pybind11::module_& m) {
  define(m, "temporal_conv_cpu", &temporal_conv_cpu, "x"_a, "weight"_a, "bias"_a, "residual"_a, "output"_a,
         pybind11::kw_only(), "sizes"_a, "residual_strides"_a, "outputs"_a, "width"_a, "threads"_a);
});

}  // namespace

}  // namespace vpf
