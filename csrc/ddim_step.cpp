#include "ddim_step.h"

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

}  // namespace vpf
