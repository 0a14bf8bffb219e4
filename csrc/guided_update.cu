#include "guided_update.h"
#include "launch.cuh"

namespace vpf {
namespace {

template <typename Noise>
__global__ void __launch_bounds__(kThreads)
    guided_update_kernel(const Latents<const float> latents, const Latents<const Noise> noise,
                         const Latents<const float> target, const Latents<const float> flow,
                         const Latents<const float> coefficients, const Latents<float> output, const Sizes sizes,
                         const Weights weights) {
  Place at;
  if (!find_place(sizes, at)) return;
  const Vote vote = load_vote(coefficients, at.vote, at.clip);
  const float* z = latents.plane(at.vote, at.clip, at.channel, at.frame);
  const Noise* e = noise.plane(at.vote, at.clip, at.channel, at.frame);
  const bool has_following = at.frame + 1 < sizes.frames;
  float warped = 0.f;
  if (has_following) {
    const float* motion = flow.pixel(0, at.clip, 0, at.frame, at.y, at.x);
    const Taps taps = bilinear_taps(at.x, at.y, motion[0], motion[flow.channel], sizes, latents, noise);
    warped = sample_x0(z + latents.frame, e + noise.frame, taps, vote);
  }
  *output.pixel(at.vote, at.clip, at.channel, at.frame, at.y, at.x) = guided_vote(
      z[at.y * latents.row + at.x * latents.column], static_cast<float>(e[at.y * noise.row + at.x * noise.column]),
      *target.pixel(0, at.clip, at.channel, at.frame, at.y, at.x), warped, has_following, vote, weights);
}

}  // namespace

std::string cuda_error(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, guided_update_kernel<float>));
  } catch (const std::runtime_error& error) {
    cudaGetLastError();  // it stays set otherwise, and the next check anywhere would report it
    return error.what();
  }
  return "";
}

void guided_update_cuda(const Latents<const float>& latents, const Latents<const void>& noise,
                        const Latents<const float>& target, const Latents<const float>& flow,
                        const Latents<const float>& coefficients, const Latents<float>& output, const Sizes& sizes,
                        double spatial_weight, double temporal_weight, NoiseType noise_dtype, int device,
                        void* stream) {
  const Weights weights = make_weights(sizes, spatial_weight, temporal_weight);
  const DeviceGuard guard(device);
  with_type(noise, noise_dtype, [&](const auto& typed_noise) {
    guided_update_kernel<<<count_blocks(sizes), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        latents, typed_noise, target, flow, coefficients, output, sizes, weights);
    check(cudaGetLastError());
  });
}

}  // namespace vpf
