#include "ddim_step.h"
#include "launch.cuh"

namespace vpf {
namespace {

template <typename Noise>
__global__ void __launch_bounds__(kThreads)
    ddim_step_kernel(const Latents<const float> latents, const Latents<const Noise> noise,
                     const Latents<const float> coefficients, const Latents<float> output, const Sizes sizes) {
  Place at;
  if (!find_place(sizes, at)) return;
  const float* steps = coefficients.plane(0, at.clip, 0, 0);
  const float latent = *latents.pixel(0, at.clip, at.channel, at.frame, at.y, at.x);
  const float predicted = static_cast<float>(*noise.pixel(0, at.clip, at.channel, at.frame, at.y, at.x));
  *output.pixel(0, at.clip, at.channel, at.frame, at.y, at.x) =
      ddim_step(latent, predicted, steps[0], steps[coefficients.column]);
}

}  // namespace

void ddim_step_cuda(const Latents<const float>& latents, const Latents<const void>& noise,
                    const Latents<const float>& coefficients, const Latents<float>& output, const Sizes& sizes,
                    NoiseType noise_dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  with_type(noise, noise_dtype, [&](const auto& typed_noise) {
    ddim_step_kernel<<<count_blocks(sizes), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        latents, typed_noise, coefficients, output, sizes);
    check(cudaGetLastError());
  });
}

}  // namespace vpf
