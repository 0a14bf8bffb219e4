// A sampler's step of one latent value, shared by the CPU and CUDA loops. Reference: videopure_fast/ops/ddim_step.py.
#pragma once

#include "latents.h"

namespace vpf {

VPF_INLINE float ddim_step(float latent, float noise, float scale, float noise_scale) {
  return scale * latent + noise_scale * noise;
}

// Both functions fill `output`, which may be the latents. Coefficients: scale and noise_scale lie along columns.
void ddim_step_cpu(const Latents<const float>& latents, const Latents<const float>& noise,
                   const Latents<const float>& coefficients, const Latents<float>& output, const Sizes& sizes,
                   int threads);

// Enqueues on `stream` of `device` and returns; throws std::runtime_error with CUDA's message if the launch fails.
void ddim_step_cuda(const Latents<const float>& latents, const Latents<const void>& noise,
                    const Latents<const float>& coefficients, const Latents<float>& output, const Sizes& sizes,
                    NoiseType noise_dtype, int device, void* stream);

}  // namespace vpf
