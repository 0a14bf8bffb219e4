// The guided update of one latent value, shared by the CPU and CUDA loops. reference.guided_update states the maths.
#pragma once

#include <cstdint>
#include <string>

#ifdef __CUDACC__
#define VPF_INLINE __host__ __device__ __forceinline__
#else
#define VPF_INLINE inline
#endif

namespace vpf {

// latents, noise, output: (votes, clips, channels, frames, height, width). target: the same without votes.
// flow: (clips, frames - 1, 2, height, width), x before y. Output and flow are contiguous.
struct Sizes {
  int64_t votes, clips, channels, frames, height, width;
};

// Distances in elements between neighbours; the pixels of one frame are contiguous.
struct Strides {
  int64_t vote, clip, channel, frame;
};

// A vote's schedule.VoteCoefficients, with the reciprocal of sqrt_alpha: one value takes up to six predictions of x0.
struct Vote {
  float inverse_sqrt_alpha, sqrt_beta, update, predicts_x0;
};

// Factors of the two gradients: 2 spatial_weight / N and temporal_weight / n, for N values a clip and n a frame.
struct Weights {
  float spatial, temporal;
};

inline Weights make_weights(const Sizes& sizes, double spatial_weight, double temporal_weight) {
  const double frame_values = static_cast<double>(sizes.channels * sizes.height * sizes.width);
  return {static_cast<float>(2 * spatial_weight / (frame_values * static_cast<double>(sizes.frames))),
          static_cast<float>(temporal_weight / frame_values)};
}

// The four pixels around a sampling position, as offsets into a frame; -1 stands for a pixel outside it.
struct Taps {
  int64_t offset[4];
  float weight[4];
};

VPF_INLINE Taps bilinear_taps(int64_t x, int64_t y, float flow_x, float flow_y, int64_t height, int64_t width) {
  Taps taps = {{-1, -1, -1, -1}, {0.f, 0.f, 0.f, 0.f}};
  const float sample_x = static_cast<float>(x) + flow_x;
  const float sample_y = static_cast<float>(y) + flow_y;
  // Positions with no pixel in reach leave here, NaN with them, so that the integer casts below are in range.
  if (!(sample_x > -1.f && sample_x < static_cast<float>(width) && sample_y > -1.f &&
        sample_y < static_cast<float>(height))) {
    return taps;
  }
  int64_t left = static_cast<int64_t>(sample_x);
  int64_t top = static_cast<int64_t>(sample_y);
  left -= sample_x < static_cast<float>(left);  // the cast rounds towards zero, floor does not
  top -= sample_y < static_cast<float>(top);
  const float right_weight = sample_x - static_cast<float>(left);
  const float bottom_weight = sample_y - static_cast<float>(top);
  for (int i = 0; i < 4; ++i) {
    const int64_t tap_x = left + (i & 1), tap_y = top + (i >> 1);
    if (tap_x >= 0 && tap_x < width && tap_y >= 0 && tap_y < height) {
      taps.offset[i] = tap_y * width + tap_x;
      taps.weight[i] = (i & 1 ? right_weight : 1.f - right_weight) * (i >> 1 ? bottom_weight : 1.f - bottom_weight);
    }
  }
  return taps;
}

VPF_INLINE float predict_x0(float latent, float noise, const Vote& vote) {
  return (latent - vote.sqrt_beta * noise) * vote.inverse_sqrt_alpha;
}

// Bilinear sample of the x0 prediction of one frame, given by that frame's latents and noise.
template <typename Noise>
VPF_INLINE float sample_x0(const float* latents, const Noise* noise, const Taps& taps, const Vote& vote) {
  float sample = 0.f;
  for (int i = 0; i < 4; ++i) {
    const int64_t at = taps.offset[i];
    if (at >= 0) sample += taps.weight[i] * predict_x0(latents[at], static_cast<float>(noise[at]), vote);
  }
  return sample;
}

// `prediction` is the x0 prediction at this value, `warped` the following frame's; the last frame has no temporal term.
VPF_INLINE float guided_vote(float latent, float noise, float target, float prediction, float warped,
                             bool has_following, const Vote& vote, const Weights& weights) {
  float gradient = weights.spatial * (prediction - target);
  if (has_following) {
    const float residual = warped - prediction;
    gradient += weights.temporal * static_cast<float>((residual > 0.f) - (residual < 0.f));
  }
  const float optimised = latent + vote.update * gradient;
  return vote.predicts_x0 != 0.f ? predict_x0(optimised, noise, vote) : optimised;
}

// Both fill `output`; latents' and noise's strides carry votes, target's vote stride is unused.
void guided_update_cpu(const float* latents, const float* noise, const float* target, const float* flow, float* output,
                       const Sizes& sizes, const Strides& latents_strides, const Strides& noise_strides,
                       const Strides& target_strides, const Vote* votes, const Weights& weights, int threads);

enum class NoiseType { float32, float16, bfloat16 };

// Enqueues on `stream` of `device` and returns; throws std::runtime_error with CUDA's sentence where the launch fails.
void guided_update_cuda(const float* latents, const void* noise, NoiseType noise_type, const float* target,
                        const float* flow, float* output, const Sizes& sizes, const Strides& latents_strides,
                        const Strides& noise_strides, const Strides& target_strides, const Vote* votes,
                        const Weights& weights, int device, void* stream);

// Why the kernels cannot run on a device, in CUDA's words, or nothing.
std::string cuda_error(int device);

}  // namespace vpf
