#include "guided_update.h"

#include <cstddef>
#include <vector>

#include "bindings.h"
#include "vector_math.h"

namespace vpf {
namespace {

// A frame's sampling positions in the plane of the following frame: offsets and weights of each pixel's four taps,
// [4, pixels]. A tap outside the frame has the offset of the zero that is appended to the plane.
struct PlaneTaps {
  explicit PlaneTaps(int64_t pixels)
      : pixels(pixels), offsets(static_cast<std::size_t>(4 * pixels)), weights(static_cast<std::size_t>(4 * pixels)) {}

  void find(const Latents<const float>& flow, int64_t clip, int64_t frame, const Sizes& sizes) {
    const Latents<const float> plane = {nullptr, 0, 0, 0, 0, sizes.width, 1};
    for (int64_t y = 0, at = 0; y < sizes.height; ++y) {
      const float* motion = flow.pixel(0, clip, 0, frame, y, 0);
      for (int64_t x = 0; x < sizes.width; ++x, ++at, motion += flow.column) {
        const Taps taps = bilinear_taps(x, y, motion[0], motion[flow.channel], sizes, plane, plane);
        for (int i = 0; i < 4; ++i) {
          offsets[i * pixels + at] = static_cast<int32_t>(taps.latents[i] < 0 ? pixels : taps.latents[i]);
          weights[i * pixels + at] = taps.weight[i];
        }
      }
    }
  }

  int64_t pixels;
  std::vector<int32_t> offsets;
  std::vector<float> weights;
};

// One frame of one channel: addresses, and strides in elements.
struct Plane {
  const float *latents, *noise;
  int64_t latents_row, latents_column, noise_row, noise_column;
};

VPF_VECTOR_CLONES void predict_plane(const Plane& plane, const Vote vote, int64_t height, int64_t width,
                                     float* __restrict prediction) {
  for (int64_t y = 0; y < height; ++y) {
    const float* z = plane.latents + y * plane.latents_row;
    const float* e = plane.noise + y * plane.noise_row;
    for (int64_t x = 0; x < width; ++x) {
      prediction[y * width + x] = predict_x0(z[x * plane.latents_column], e[x * plane.noise_column], vote);
    }
  }
}

VPF_VECTOR_CLONES void sample_plane(const float* __restrict prediction, const int32_t* __restrict offsets,
                                    const float* __restrict weights, int64_t pixels, float* __restrict warped) {
  for (int64_t at = 0; at < pixels; ++at) {
    float sample = 0.f;
    for (int64_t i = 0; i < 4; ++i) sample += weights[i * pixels + at] * prediction[offsets[i * pixels + at]];
    warped[at] = sample;
  }
}

VPF_VECTOR_CLONES void guide_row(const float* __restrict z, int64_t z_column, const float* __restrict e,
                                 int64_t e_column, const float* __restrict target, int64_t target_column,
                                 const float* __restrict warped, bool has_following, const Vote vote,
                                 const Weights weights, float* __restrict output, int64_t output_column,
                                 int64_t width) {
  for (int64_t x = 0; x < width; ++x) {
    output[x * output_column] = guided_vote(z[x * z_column], e[x * e_column], target[x * target_column], warped[x],
                                            has_following, vote, weights);
  }
}

}  // namespace

void guided_update_cpu(const Latents<const float>& latents, const Latents<const float>& noise,
                       const Latents<const float>& target, const Latents<const float>& flow,
                       const Latents<const float>& coefficients, const Latents<float>& output, const Sizes& sizes,
                       double spatial_weight, double temporal_weight, int threads) {
  const Weights weights = make_weights(sizes, spatial_weight, temporal_weight);
  const int64_t pixels = sizes.height * sizes.width;
  const int64_t all_frames = sizes.clips * sizes.frames;

  // One frame at a time: its sampling positions serve all channels and votes. Frames share no output, so the number of
  // threads cannot change a bit.
#pragma omp parallel num_threads(threads)
  {
    PlaneTaps taps(pixels);
    std::vector<float> following(static_cast<std::size_t>(pixels + 1)), warped(static_cast<std::size_t>(pixels));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < all_frames; ++i) {
      const int64_t clip = i / sizes.frames, frame = i % sizes.frames;
      const bool has_following = frame + 1 < sizes.frames;
      if (has_following) taps.find(flow, clip, frame, sizes);
      for (int64_t v = 0; v < sizes.votes; ++v) {
        const Vote vote = load_vote(coefficients, v, clip);
        for (int64_t channel = 0; channel < sizes.channels; ++channel) {
          const float* z = latents.plane(v, clip, channel, frame);
          const float* e = noise.plane(v, clip, channel, frame);
          if (has_following) {
            const Plane next = {z + latents.frame, e + noise.frame, latents.row,
                                latents.column,    noise.row,       noise.column};
            predict_plane(next, vote, sizes.height, sizes.width, following.data());
            sample_plane(following.data(), taps.offsets.data(), taps.weights.data(), pixels, warped.data());
          }
          for (int64_t y = 0; y < sizes.height; ++y) {
            guide_row(z + y * latents.row, latents.column, e + y * noise.row, noise.column,
                      target.pixel(0, clip, channel, frame, y, 0), target.column, warped.data() + y * sizes.width,
                      has_following, vote, weights, output.pixel(v, clip, channel, frame, y, 0), output.column,
                      sizes.width);
          }
        }
      }
    }
  }
}

namespace {

using pybind11::literals::operator""_a;

const Binding binding([](pybind11::module_& m) {
  define(m, "guided_update_cpu", &guided_update_cpu, "latents"_a, "noise"_a, "target"_a, "flow"_a, "coefficients"_a,
         "output"_a, pybind11::kw_only(), "sizes"_a, "spatial_weight"_a, "temporal_weight"_a, "threads"_a);
#ifdef VPF_HAS_CUDA
  define(m, "guided_update_cuda", &guided_update_cuda, "latents"_a, "noise"_a, "target"_a, "flow"_a, "coefficients"_a,
         "output"_a, pybind11::kw_only(), "sizes"_a, "spatial_weight"_a, "temporal_weight"_a, "noise_dtype"_a,
         "device"_a, "stream"_a);
#endif
});

}  // namespace

}  // namespace vpf
