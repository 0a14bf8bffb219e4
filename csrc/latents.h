// Tensors of latents, as the CPU and CUDA loops of guided_update and ddim_step see them.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VPF_INLINE __host__ __device__ __forceinline__
#else
#define VPF_INLINE inline
#endif

namespace vpf {

// Of latents (votes, clips, channels, frames, height, width); where an op has no votes, there is one.
struct Sizes {
  int64_t votes, clips, channels, frames, height, width;
};

// The first value, and the distances in elements between neighbors; 0 along a dimension that the tensor lacks.
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
