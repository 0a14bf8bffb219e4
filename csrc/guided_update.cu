#include "guided_update.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace vpf {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kVotesPerLaunch = 64;  // 1 KiB of the 4 KiB that every architecture takes as kernel arguments

struct Votes {
  Vote at[kVotesPerLaunch];
};

// One thread a value, the values of all votes and clips along grid.x: its limit is 2^31 - 1 blocks, y's and z's 65,535.
template <typename Noise>
__global__ void __launch_bounds__(kThreads)
    guided_update_kernel(const float* __restrict__ latents, const Noise* __restrict__ noise,
                         const float* __restrict__ target, const float* __restrict__ flow,
                         float* __restrict__ output, const Sizes sizes, const Strides latents_strides,
                         const Strides noise_strides, const Strides target_strides,
                         const __grid_constant__ Votes votes, const Weights weights) {
  const int64_t pixels = sizes.height * sizes.width;
  const int64_t values = sizes.votes * sizes.clips * sizes.channels * sizes.frames * pixels;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= values) return;

  int64_t rest = index / pixels;
  const int64_t pixel = index - rest * pixels;
  const int64_t frame = rest % sizes.frames;
  rest /= sizes.frames;
  const int64_t channel = rest % sizes.channels;
  rest /= sizes.channels;
  const int64_t clip = rest % sizes.clips;
  const int64_t v = rest / sizes.clips;

  const Vote& vote = votes.at[v];
  const float* z = latents + v * latents_strides.vote + clip * latents_strides.clip +
                   channel * latents_strides.channel + frame * latents_strides.frame;
  const Noise* e = noise + v * noise_strides.vote + clip * noise_strides.clip + channel * noise_strides.channel +
                   frame * noise_strides.frame;
  const float latent = z[pixel];
  const float predicted_noise = static_cast<float>(e[pixel]);
  const float wanted = target[clip * target_strides.clip + channel * target_strides.channel +
                              frame * target_strides.frame + pixel];

  const bool has_following = frame + 1 < sizes.frames;
  float warped = 0.f;
  if (has_following) {
    const float* pixel_flow = flow + (clip * (sizes.frames - 1) + frame) * 2 * pixels + pixel;
    const int64_t y = pixel / sizes.width;
    const Taps taps = bilinear_taps(pixel - y * sizes.width, y, pixel_flow[0], pixel_flow[pixels], sizes.height,
                                    sizes.width);
    warped = sample_x0(z + latents_strides.frame, e + noise_strides.frame, taps, vote);
  }
  const float prediction = predict_x0(latent, predicted_noise, vote);
  output[index] =
      guided_vote(latent, predicted_noise, wanted, prediction, warped, has_following, vote, weights);
}

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Kernels launch on the current device, which the caller's thread may have set to another than the tensors'.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_));
    if (device != previous_) check(cudaSetDevice(device));
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

template <typename Noise>
void launch(const float* latents, const Noise* noise, const float* target, const float* flow, float* output,
            const Sizes& sizes, const Strides& latents_strides, const Strides& noise_strides,
            const Strides& target_strides, const Vote* votes, const Weights& weights, cudaStream_t stream) {
  const int64_t values_per_vote = sizes.clips * sizes.channels * sizes.frames * sizes.height * sizes.width;
  for (int64_t first = 0; first < sizes.votes; first += kVotesPerLaunch) {
    Sizes chunk = sizes;
    chunk.votes = std::min(kVotesPerLaunch, sizes.votes - first);
    Votes chunk_votes{};
    std::copy_n(votes + first, chunk.votes, chunk_votes.at);
    const int64_t blocks = (chunk.votes * values_per_vote + kThreads - 1) / kThreads;
    if (blocks > 0x7fffffff) throw std::runtime_error("guided_update: too many values for one launch");
    guided_update_kernel<Noise><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        latents + first * latents_strides.vote, noise + first * noise_strides.vote, target, flow,
        output + first * values_per_vote, chunk, latents_strides, noise_strides, target_strides, chunk_votes, weights);
    check(cudaGetLastError());
  }
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

void guided_update_cuda(const float* latents, const void* noise, NoiseType noise_type, const float* target,
                        const float* flow, float* output, const Sizes& sizes, const Strides& latents_strides,
                        const Strides& noise_strides, const Strides& target_strides, const Vote* votes,
                        const Weights& weights, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto run = [&](const auto* typed_noise) {
    launch(latents, typed_noise, target, flow, output, sizes, latents_strides, noise_strides, target_strides, votes,
           weights, static_cast<cudaStream_t>(stream));
  };
  switch (noise_type) {
    case NoiseType::float32: return run(static_cast<const float*>(noise));
    case NoiseType::float16: return run(static_cast<const __half*>(noise));
    case NoiseType::bfloat16: return run(static_cast<const __nv_bfloat16*>(noise));
  }
}

}  // namespace vpf
