// Tensors of latents in the CPU and CUDA loops of guided_update and ddim_step.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VPF_INLINE __host__ __device__ __forceinline__
#else
#define VPF_INLINE inline
#endif

namespace vpf {

// Sizes of latents (votes, clips, channels, frames, height, width); votes is 1 for an op without votes.
struct Sizes {
  int64_t votes, clips, channels, frames, height, width;
};

// Address and strides, in elements, of a tensor; the stride is 0 along a dimension that the tensor lacks.
template <typename T>
struct Latents {
  T* data;
  int64_t vote, clip, channel, frame, row, column;

  VPF_INLINE T* plane(int64_t v, int64_t b, int64_t c, int64_t f) const {
    return data + v * vote + b * clip + c * channel + f * frame;
  }
  VPF_INLINE T* pixel(int64_t v, int64_t b, int64_t c, int64_t f, int64_t y, int64_t x) const {
    return plane(v, b, c, f) + y * row + x * column;
  }
  template <typename U>
  Latents<U> as() const {
    return {static_cast<U*>(data), vote, clip, channel, frame, row, column};
  }
};

enum class NoiseType { float32, float16, bfloat16 };

}  // namespace vpf
