#include "ddim_step.h"

#include "bindings.h"

namespace vpf {

void ddim_step_cpu(const Latents<const float>& latents, const Latents<const float>& noise,
                   const Latents<const float>& coefficients, const Latents<float>& output, const Sizes& sizes,
                   int threads) {
  const int64_t planes = sizes.clips * sizes.channels * sizes.frames;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int64_t frame = plane % sizes.frames;
    const int64_t channel = plane / sizes.frames % sizes.channels;
    const int64_t clip = plane / sizes.frames / sizes.channels;
    const float* steps = coefficients.plane(0, clip, 0, 0);
    const float scale = steps[0], noise_scale = steps[coefficients.column];
    for (int64_t y = 0; y < sizes.height; ++y) {
      const float* z = latents.pixel(0, clip, channel, frame, y, 0);
      const float* e = noise.pixel(0, clip, channel, frame, y, 0);
      float* out = output.pixel(0, clip, channel, frame, y, 0);
      for (int64_t x = 0; x < sizes.width; ++x) {
        out[x * output.column] = ddim_step(z[x * latents.column], e[x * noise.column], scale, noise_scale);
      }
    }
  }
}

namespace {

using pybind11::literals::operator""_a;

const Binding binding([](pybind11::module_& m) {
  define(m, "ddim_step_cpu", &ddim_step_cpu, "latents"_a, "noise"_a, "coefficients"_a, "output"_a, pybind11::kw_only(),
         "sizes"_a, "threads"_a);
#ifdef VPF_HAS_CUDA
  define(m, "ddim_step_cuda", &ddim_step_cuda, "latents"_a, "noise"_a, "coefficients"_a, "output"_a,
         pybind11::kw_only(), "sizes"_a, "noise_dtype"_a, "device"_a, "stream"_a);
#endif
});

}  // namespace

}  // namespace vpf
