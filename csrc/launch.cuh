// Shared by the CUDA files: error checks, the current device, a thread's position in the latents, the noise's types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "latents.h"

namespace vpf {

constexpr int kThreads = 256;
constexpr int64_t kMost = 0x7fffffff;  // blocks along grid.x, and planes and pixels counted in 32 bits

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Makes `device` current while it lives: kernels launch on the current device, which may be another than the tensors'.
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

// Blocks for one thread per value, all along grid.x, whose limit is 2^31 - 1 blocks (y and z: 65,535).
inline unsigned count_blocks(const Sizes& sizes) {
  const int64_t planes = sizes.votes * sizes.clips * sizes.channels * sizes.frames;
  const int64_t pixels = sizes.height * sizes.width;
  const int64_t blocks = (planes * pixels + kThreads - 1) / kThreads;
  if (planes > kMost || pixels > kMost - kThreads || blocks > kMost) {
    throw std::runtime_error("too many latents for one launch");
  }
  return static_cast<unsigned>(blocks);
}

struct Place {
  int64_t vote, clip, channel, frame, y, x;
};

// Finds this thread's position; false beyond the last value. One division has 64 bits, the others 32, which is faster.
__device__ __forceinline__ bool find_place(const Sizes& sizes, Place& place) {
  const int64_t pixels = sizes.height * sizes.width;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads;
  const int64_t first_plane = first / pixels;
  const uint32_t offset = static_cast<uint32_t>(first - first_plane * pixels) + threadIdx.x;
  uint32_t rest = static_cast<uint32_t>(first_plane) + offset / static_cast<uint32_t>(pixels);
  const uint32_t pixel = offset % static_cast<uint32_t>(pixels);
  place.y = pixel / static_cast<uint32_t>(sizes.width);
  place.x = pixel % static_cast<uint32_t>(sizes.width);
  place.frame = rest % static_cast<uint32_t>(sizes.frames);
  rest /= static_cast<uint32_t>(sizes.frames);
  place.channel = rest % static_cast<uint32_t>(sizes.channels);
  rest /= static_cast<uint32_t>(sizes.channels);
  place.clip = rest % static_cast<uint32_t>(sizes.clips);
  place.vote = rest / static_cast<uint32_t>(sizes.clips);
  return place.vote < sizes.votes;
}

// Calls launch(noise) with the noise as Latents of its own type.
template <typename Launch>
void with_type(const Latents<const void>& noise, NoiseType type, const Launch& launch) {
  switch (type) {
    case NoiseType::float32: return launch(noise.as<const float>());
    case NoiseType::float16: return launch(noise.as<const __half>());
    case NoiseType::bfloat16: return launch(noise.as<const __nv_bfloat16>());
  }
}

}  // namespace vpf
