#include "guided_update.h"

#include <cstddef>
#include <vector>

namespace vpf {

void guided_update_cpu(const float* latents, const float* noise, const float* target, const float* flow, float* output,
                       const Sizes& sizes, const Strides& latents_strides, const Strides& noise_strides,
                       const Strides& target_strides, const Vote* votes, const Weights& weights, int threads) {
  const int64_t pixels = sizes.height * sizes.width;
  const int64_t rows = sizes.clips * sizes.frames * sizes.height;

  // One row of one frame at a time: where its flow points serves all channels and votes. Rows share no output, so the
  // number of threads cannot change a bit of it.
#pragma omp parallel num_threads(threads)
  {
    std::vector<Taps> taps(static_cast<std::size_t>(sizes.width));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t y = row % sizes.height;
      const int64_t frame = row / sizes.height % sizes.frames;
      const int64_t clip = row / sizes.height / sizes.frames;
      const bool has_following = frame + 1 < sizes.frames;
      if (has_following) {
        const float* row_flow = flow + (clip * (sizes.frames - 1) + frame) * 2 * pixels + y * sizes.width;
        for (int64_t x = 0; x < sizes.width; ++x) {
          taps[x] = bilinear_taps(x, y, row_flow[x], row_flow[pixels + x], sizes.height, sizes.width);
        }
      }
      for (int64_t v = 0; v < sizes.votes; ++v) {
        const Vote& vote = votes[v];
        for (int64_t channel = 0; channel < sizes.channels; ++channel) {
          const float* z = latents + v * latents_strides.vote + clip * latents_strides.clip +
                           channel * latents_strides.channel + frame * latents_strides.frame;
          const float* e = noise + v * noise_strides.vote + clip * noise_strides.clip +
                           channel * noise_strides.channel + frame * noise_strides.frame;
          const float* wanted = target + clip * target_strides.clip + channel * target_strides.channel +
                                frame * target_strides.frame;
          float* out =
              output + (((v * sizes.clips + clip) * sizes.channels + channel) * sizes.frames + frame) * pixels;
          for (int64_t x = 0; x < sizes.width; ++x) {
            const int64_t at = y * sizes.width + x;
            const float prediction = predict_x0(z[at], e[at], vote);
            const float warped =
                has_following ? sample_x0(z + latents_strides.frame, e + noise_strides.frame, taps[x], vote) : 0.f;
            out[at] = guided_vote(z[at], e[at], wanted[at], prediction, warped, has_following, vote, weights);
          }
        }
      }
    }
  }
}

}  // namespace vpf
