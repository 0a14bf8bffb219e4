#include "group_norm_silu.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "bindings.h"
#include "vector_math.h"

namespace vpf {
namespace {

// Pixels per chunk. A chunk is summed in float32; the chunks' sums are joined in float64.
constexpr int64_t kChunk = 64;

std::vector<double> doubles(int64_t size) { return std::vector<double>(static_cast<std::size_t>(size)); }

// The values that share statistics: all pixels of one frame, or of all frames of a clip. They are cut into chunks, each
// of pixels of one frame.
struct Sample {
  const float *x, *embedding;
  float* output;
  int64_t frames, pixels, channels, frame_stride, pixel_stride;

  int64_t chunks_per_frame() const { return (pixels + kChunk - 1) / kChunk; }
  int64_t chunks() const { return frames * chunks_per_frame(); }
  int64_t first_pixel(int64_t chunk) const { return chunk % chunks_per_frame() * kChunk; }
  int64_t length(int64_t chunk) const { return std::min(kChunk, pixels - first_pixel(chunk)); }
  const float* input(int64_t chunk) const {
    return x + chunk / chunks_per_frame() * frame_stride + first_pixel(chunk) * pixel_stride;
  }
  float* result(int64_t chunk) const {
    return output + (chunk / chunks_per_frame() * pixels + first_pixel(chunk)) * channels;
  }
};

struct Norm {
  const float *weight, *bias;
  int64_t groups;
  double eps;
  bool silu;
};

// Buffers for one sample: sums of each chunk and channel, mean and sum of squared deviations of each channel, and the
// constants of the result, (x - offset) scale + shift before the activation.
struct Work {
  explicit Work(const Sample& sample)
      : sums(floats(sample.chunks() * 2 * sample.channels)),
        means(doubles(sample.channels)),
        deviations(doubles(sample.channels)),
        offset(floats(sample.channels)),
        scale(floats(sample.channels)),
        shift(floats(sample.channels)) {}

  std::vector<float> sums;
  std::vector<double> means, deviations;
  std::vector<float> offset, scale, shift;
};

// Sums over a chunk, for each channel, of x - x[first pixel] and of its square. Subtracting one of the chunk's own
// values bounds the loss to cancellation for any mean. The sums stay in registers.
template <int64_t kLanes>
VPF_ALWAYS_INLINE void sum_channels(const float* __restrict x, int64_t stride, int64_t length, float* __restrict sums,
                                    float* __restrict squares) {
  float sum[kLanes] = {}, square[kLanes] = {};
  for (int64_t pixel = 1; pixel < length; ++pixel) {
#pragma omp simd
    for (int64_t c = 0; c < kLanes; ++c) {
      const float distance = x[pixel * stride + c] - x[c];
      sum[c] += distance;
      square[c] += distance * distance;
    }
  }
  std::copy_n(sum, kLanes, sums);
  std::copy_n(square, kLanes, squares);
}

VPF_VECTOR_CLONES void sum_chunk(const float* __restrict x, int64_t stride, int64_t length, int64_t channels,
                                 float* __restrict sums, float* __restrict squares) {
  int64_t c = 0;
  for (; c + 32 <= channels; c += 32) sum_channels<32>(x + c, stride, length, sums + c, squares + c);
  for (; c + 8 <= channels; c += 8) sum_channels<8>(x + c, stride, length, sums + c, squares + c);
  for (; c < channels; ++c) sum_channels<1>(x + c, stride, length, sums + c, squares + c);
}

// Adds a chunk to each channel's mean and sum of squared deviations over the `before` pixels of earlier chunks (Chan,
// Golub and LeVeque, 1983).
VPF_VECTOR_CLONES void join_chunk(const float* __restrict first, const float* __restrict sums,
                                  const float* __restrict squares, double length, double before, int64_t channels,
                                  double* __restrict means, double* __restrict deviations) {
  const double share = length / (before + length);
  for (int64_t c = 0; c < channels; ++c) {
    const double sum = sums[c];
    const double distance = first[c] + sum / length - means[c];
    means[c] += distance * share;
    deviations[c] += squares[c] - sum * sum / length + distance * distance * before * share;
  }
}

VPF_VECTOR_CLONES void apply_chunk(const float* __restrict x, int64_t stride, int64_t length, int64_t channels,
                                   const float* __restrict offset, const float* __restrict scale,
                                   const float* __restrict shift, bool with_silu, float* __restrict output) {
  for (int64_t pixel = 0; pixel < length; ++pixel) {
    const float* from = x + pixel * stride;
    float* to = output + pixel * channels;
    if (with_silu) {
      for (int64_t c = 0; c < channels; ++c) to[c] = silu((from[c] - offset[c]) * scale[c] + shift[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) to[c] = (from[c] - offset[c]) * scale[c] + shift[c];
    }
  }
}

void sum(const Sample& sample, int64_t chunk, Work& work) {
  float* sums = work.sums.data() + chunk * 2 * sample.channels;
  sum_chunk(sample.input(chunk), sample.pixel_stride, sample.length(chunk), sample.channels, sums,
            sums + sample.channels);
}

// One thread joins the chunks in order: the number of threads cannot change a bit.
void join(const Sample& sample, const Norm& norm, Work& work) {
  const int64_t channels = sample.channels, size = channels / norm.groups;
  std::vector<double>&means = work.means, &deviations = work.deviations;
  std::fill(means.begin(), means.end(), 0.);
  std::fill(deviations.begin(), deviations.end(), 0.);
  double pixels = 0;
  for (int64_t chunk = 0; chunk < sample.chunks(); ++chunk) {
    const float* sums = work.sums.data() + chunk * 2 * channels;
    const double length = static_cast<double>(sample.length(chunk));
    join_chunk(sample.input(chunk), sums, sums + channels, length, pixels, channels, means.data(), deviations.data());
    pixels += length;
  }
  // The embedding is added to every pixel, and so to the channel's mean.
  const float* embedding = sample.embedding;
  for (int64_t c = 0; embedding && c < channels; ++c) means[c] += embedding[c];
  const double inverse_size = 1. / static_cast<double>(size), inverse_values = inverse_size / pixels;
  for (int64_t start = 0; start < channels; start += size) {
    double mean = 0, deviation = 0;
    for (int64_t c = start; c < start + size; ++c) mean += means[c] * inverse_size;
    for (int64_t c = start; c < start + size; ++c) {
      deviation += deviations[c] + pixels * (means[c] - mean) * (means[c] - mean);
    }
    const double inverse = 1 / std::sqrt(std::max(deviation * inverse_values, 0.) + norm.eps);
    for (int64_t c = start; c < start + size; ++c) {
      const double offset = mean - (embedding ? embedding[c] : 0.f), scale = norm.weight[c] * inverse;
      work.offset[c] = static_cast<float>(offset);
      work.scale[c] = static_cast<float>(scale);
      // The shift makes up for the rounding of the offset to float32.
      work.shift[c] = static_cast<float>(norm.bias[c] - (offset - work.offset[c]) * scale);
    }
  }
}

void apply(const Sample& sample, int64_t chunk, const Norm& norm, const Work& work) {
  apply_chunk(sample.input(chunk), sample.pixel_stride, sample.length(chunk), sample.channels, work.offset.data(),
              work.scale.data(), work.shift.data(), norm.silu, sample.result(chunk));
}

}  // namespace

void group_norm_silu_cpu(const float* x, const float* weight, const float* bias, const float* embedding, float* output,
                         const ActivationSizes& sizes, const ActivationStrides& strides, int64_t groups, double eps,
                         bool over_frames, bool silu, int threads) {
  const int64_t frames = sizes.frames, pixels = sizes.pixels, channels = sizes.channels;
  const int64_t per_clip = over_frames ? 1 : frames, samples = sizes.clips * per_clip;
  const Norm norm = {weight, bias, groups, eps, silu};
  const auto make_sample = [&](int64_t i) -> Sample {
    const int64_t clip = i / per_clip, frame = i % per_clip;
    return {x + clip * strides.clip + frame * strides.frame,
            embedding ? embedding + clip * channels : nullptr,
            output + (clip * frames + frame) * pixels * channels,
            over_frames ? frames : 1,
            pixels,
            channels,
            strides.frame,
            strides.pixel};
  };
  threads = useful_threads(threads, sizes.clips * frames * pixels * channels);
  // The threads share the samples; where there are fewer samples than threads, they share each sample's chunks.
  if (samples >= threads) {
#pragma omp parallel num_threads(threads)
    {
      Work work(make_sample(0));
#pragma omp for schedule(static)
      for (int64_t i = 0; i < samples; ++i) {
        const Sample sample = make_sample(i);
        for (int64_t chunk = 0; chunk < sample.chunks(); ++chunk) sum(sample, chunk, work);
        join(sample, norm, work);
        for (int64_t chunk = 0; chunk < sample.chunks(); ++chunk) apply(sample, chunk, norm, work);
      }
    }
    return;
  }
  Work work(make_sample(0));
  for (int64_t i = 0; i < samples; ++i) {
    const Sample sample = make_sample(i);
    const int64_t chunks = sample.chunks();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum(sample, chunk, work);
#pragma omp single
      join(sample, norm, work);
#pragma omp for schedule(static)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) apply(sample, chunk, norm, work);
    }
  }
}

namespace {

using pybind11::literals::operator""_a;

const Binding binding([](pybind11::module_& m) {
  define(m, "group_norm_silu_cpu", &group_norm_silu_cpu, "x"_a, "weight"_a, "bias"_a, "embedding"_a, "output"_a,
         pybind11::kw_only(), "sizes"_a, "strides"_a, "groups"_a, "eps"_a, "over_frames"_a, "silu"_a, "threads"_a);
});

}  // namespace

}  // namespace vpf
