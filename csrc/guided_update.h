// The guided update of one latent value, shared by the CPU and CUDA loops.
// Reference: videopure_fast/ops/guided_update.py.
#pragma once

#include <string>

#include "latents.h"

namespace vpf {

// A schedule.VoteCoefficients, but with 1 / sqrt_alpha: one output value needs up to six predictions of x0.
struct Vote {
  float inverse_sqrt_alpha, sqrt_beta, update, predicts_x0;
};

// The coefficients of one vote of one clip, which lie along columns.
VPF_INLINE Vote load_vote(const Latents<const float>& coefficients, int64_t vote, int64_t clip) {
  const float* at = coefficients.plane(vote, clip, 0, 0);
  return {1.f / at[0], at[coefficients.column], at[2 * coefficients.column], at[3 * coefficients.column]};
}

// Factors of the two gradients: 2 spatial_weight / N and temporal_weight / n, for N values of a clip and n of a frame.
struct Weights {
  float spatial, temporal;
};

inline Weights make_weights(const Sizes& sizes, double spatial_weight, double temporal_weight) {
  const double frame_values = static_cast<double>(sizes.channels * sizes.height * sizes.width);
  return {static_cast<float>(2 * spatial_weight / (frame_values * static_cast<double>(sizes.frames))),
          static_cast<float>(temporal_weight / frame_values)};
}

// The four pixels around a sampling position, as offsets into a frame of each tensor; -1 for a pixel outside the frame.
struct Taps {
  int64_t latents[4], noise[4];
  float weight[4];
};

template <typename Noise>
VPF_INLINE Taps bilinear_taps(int64_t x, int64_t y, float flow_x, float flow_y, const Sizes& sizes,
                              const Latents<const float>& latents, const Latents<const Noise>& noise) {
  Taps taps = {{-1, -1, -1, -1}, {-1, -1, -1, -1}, {0.f, 0.f, 0.f, 0.f}};
  const float sample_x = static_cast<float>(x) + flow_x;
  const float sample_y = static_cast<float>(y) + flow_y;
  // Return early for NaN and for positions without a pixel in reach, so that the integer casts below are in range.
  if (!(sample_x > -1.f && sample_x < static_cast<float>(sizes.width) && sample_y > -1.f &&
        sample_y < static_cast<float>(sizes.height))) {
    return taps;
  }
  int64_t left = static_cast<int64_t>(sample_x);
  int64_t top = static_cast<int64_t>(sample_y);
  left -= sample_x < static_cast<float>(left);  // floor: the cast rounds towards zero
  top -= sample_y < static_cast<float>(top);
  const float right_weight = sample_x - static_cast<float>(left);
  const float bottom_weight = sample_y - static_cast<float>(top);
  for (int i = 0; i < 4; ++i) {
    const int64_t tap_x = left + (i & 1), tap_y = top + (i >> 1);
    if (tap_x >= 0 && tap_x < sizes.width && tap_y >= 0 && tap_y < sizes.height) {
      taps.latents[i] = tap_y * latents.row + tap_x * latents.column;
      taps.noise[i] = tap_y * noise.row + tap_x * noise.column;
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
    if (taps.latents[i] >= 0) {
      const float tap_noise = static_cast<float>(noise[taps.noise[i]]);
      sample += taps.weight[i] * predict_x0(latents[taps.latents[i]], tap_noise, vote);
    }
  }
  return sample;
}

// `warped` is the sample of the following frame's x0 prediction; the last frame has no temporal term.
VPF_INLINE float guided_vote(float latent, float noise, float target, float warped, bool has_following,
                             const Vote& vote, const Weights& weights) {
  const float prediction = predict_x0(latent, noise, vote);
  float gradient = weights.spatial * (prediction - target);
  if (has_following) {
    const float residual = warped - prediction;
    gradient += weights.temporal * static_cast<float>((residual > 0.f) - (residual < 0.f));
  }
  const float optimized = latent + vote.update * gradient;
  return vote.predicts_x0 != 0.f ? predict_x0(optimized, noise, vote) : optimized;
}

// Both functions fill `output`. The flow's channels are x and y.
void guided_update_cpu(const Latents<const float>& latents, const Latents<const float>& noise,
                       const Latents<const float>& target, const Latents<const float>& flow,
                       const Latents<const float>& coefficients, const Latents<float>& output, const Sizes& sizes,
                       double spatial_weight, double temporal_weight, int threads);

// Enqueues on `stream` of `device` and returns; throws std::runtime_error with CUDA's message if the launch fails.
void guided_update_cuda(const Latents<const float>& latents, const Latents<const void>& noise,
                        const Latents<const float>& target, const Latents<const float>& flow,
                        const Latents<const float>& coefficients, const Latents<float>& output, const Sizes& sizes,
                        double spatial_weight, double temporal_weight, NoiseType noise_dtype, int device, void* stream);

// CUDA's message on why the extension's kernels cannot run on a device; empty if they can.
std::string cuda_error(int device);

}  // namespace vpf
