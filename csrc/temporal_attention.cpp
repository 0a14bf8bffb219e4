#include "temporal_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector_math.h"

namespace vpf {
namespace {

// Queries that are scored together, one in each lane of a vector: no sum or maximum goes across lanes.
constexpr int64_t kLanes = 16;
// Keys that share one load of the lanes' queries, and queries that share one load of a value's channels.
constexpr int64_t kBlock = 4;
// Values of heads that are copied together, 128 KiB, so that whole lines are read in order.
constexpr int64_t kCopied = 32768;

// A pixel's heads, so many at a time, in fast memory: rows of the frames are often a multiple of 4 KiB apart, where
// they would take each other's places in a cache. The keys' last block is filled up with zeros, and a value's last
// channels with whatever follows.
struct Scratch {
  Scratch(int64_t frames, int64_t heads, int64_t size)
      : heads(std::clamp<int64_t>(kCopied / (3 * frames * size), 1, heads)),
        rows(floats((frames + kBlock) * 3 * this->heads * size + kLanes)),
        queries(floats(size * kLanes)),
        weights(floats((frames + kBlock) * kLanes)) {}

  int64_t heads;
  std::vector<float> rows, queries, weights;  // [frames, 3, heads, size], [size, kLanes], [frames, kLanes]
};

// weights = keys x queries.
VPF_ALWAYS_INLINE void score(const float* __restrict queries, const float* __restrict keys, int64_t stride,
                             float* __restrict weights, int64_t frames, int64_t size) {
  for (int64_t key = 0; key < frames; key += kBlock) {
    const float *k0 = keys + key * stride, *k1 = k0 + stride, *k2 = k1 + stride, *k3 = k2 + stride;
    float s0[kLanes] = {}, s1[kLanes] = {}, s2[kLanes] = {}, s3[kLanes] = {};
    for (int64_t c = 0; c < size; ++c) {
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const float q = queries[c * kLanes + lane];
        s0[lane] += q * k0[c];
        s1[lane] += q * k1[c];
        s2[lane] += q * k2[c];
        s3[lane] += q * k3[c];
      }
    }
    float* w = weights + key * kLanes;
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      w[lane] = s0[lane];
      w[kLanes + lane] = s1[lane];
      w[2 * kLanes + lane] = s2[lane];
      w[3 * kLanes + lane] = s3[lane];
    }
  }
}

// Softmax of the weights over the keys, but for a factor: `inverse`, one over their sum.
VPF_ALWAYS_INLINE void weigh(float* __restrict weights, float* __restrict inverse, int64_t frames) {
  float most[kLanes], sum[kLanes] = {};
#pragma omp simd
  for (int64_t lane = 0; lane < kLanes; ++lane) most[lane] = weights[lane];
  for (int64_t key = 1; key < frames; ++key) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) most[lane] = std::max(most[lane], weights[key * kLanes + lane]);
  }
  for (int64_t key = 0; key < frames; ++key) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float below = most[lane] - weights[key * kLanes + lane];
      const float weight = exp_of_negative(1.f, below > 88.f ? 88.f : below, kNothing);
      weights[key * kLanes + lane] = weight;
      sum[lane] += weight;
    }
  }
#pragma omp simd
  for (int64_t lane = 0; lane < kLanes; ++lane) inverse[lane] = 1.f / sum[lane];
}

// output = weights x values x inverse, for `count` of the lanes' queries. kWidth channels fill a vector.
template <int64_t kWidth>
VPF_ALWAYS_INLINE void average(const float* __restrict weights, const float* __restrict values, int64_t stride,
                               const float* __restrict inverse, float* __restrict output, int64_t output_stride,
                               int64_t count, int64_t frames, int64_t size) {
  for (int64_t query = 0; query < count; query += kBlock) {
    for (int64_t channel = 0; channel < size; channel += kWidth) {
      float s0[kWidth] = {}, s1[kWidth] = {}, s2[kWidth] = {}, s3[kWidth] = {};
      for (int64_t key = 0; key < frames; ++key) {
        const float* w = weights + key * kLanes + query;
        const float* v = values + key * stride + channel;
#pragma omp simd
        for (int64_t c = 0; c < kWidth; ++c) {
          s0[c] += w[0] * v[c];
          s1[c] += w[1] * v[c];
          s2[c] += w[2] * v[c];
          s3[c] += w[3] * v[c];
        }
      }
      const float* sums[kBlock] = {s0, s1, s2, s3};
      for (int64_t i = 0; i < std::min(kBlock, count - query); ++i) {
        float* row = output + (query + i) * output_stride + channel;
        if (channel + kWidth <= size) {
#pragma omp simd
          for (int64_t c = 0; c < kWidth; ++c) row[c] = sums[i][c] * inverse[query + i];
        } else {
          for (int64_t c = 0; c < size - channel; ++c) row[c] = sums[i][c] * inverse[query + i];
        }
      }
    }
  }
}

// One pixel; `qkv` and `output` point at its first frame, and the next ones lie a stride further each.
VPF_VECTOR_CLONES void attend(const float* qkv, int64_t qkv_stride, float* output, int64_t output_stride,
                              int64_t frames, int64_t heads, int64_t size, Scratch& scratch) {
  const float scale = 1.f / std::sqrt(static_cast<float>(size));
  float* __restrict rows = scratch.rows.data();
  float* __restrict queries = scratch.queries.data();
  float* weights = scratch.weights.data();
  float inverse[kLanes];
  const int64_t part = scratch.heads * size, row_size = 3 * part;
  for (int64_t start = 0; start < heads; start += scratch.heads) {
    const int64_t here = std::min(scratch.heads, heads - start);
    for (int64_t row = 0; row < 3 * frames; ++row) {
      const float* from = qkv + row / 3 * qkv_stride + (row % 3 * heads + start) * size;
      for (int64_t c = 0; c < here * size; ++c) rows[row * part + c] = from[c];
    }
    for (int64_t head = 0; head < here; ++head) {
      const float* q = rows + head * size;
      for (int64_t first = 0; first < frames; first += kLanes) {
        const int64_t count = std::min(kLanes, frames - first);
        const float* block = q + first * row_size;
        for (int64_t c = 0; c < size; ++c) {
          for (int64_t lane = 0; lane < count; ++lane) queries[c * kLanes + lane] = scale * block[lane * row_size + c];
        }
        score(queries, q + part, row_size, weights, frames, size);
        weigh(weights, inverse, frames);
        float* to = output + first * output_stride + (start + head) * size;
        if (size <= kLanes / 2) {
          average<kLanes / 2>(weights, q + 2 * part, row_size, inverse, to, output_stride, count, frames, size);
        } else {
          average<kLanes>(weights, q + 2 * part, row_size, inverse, to, output_stride, count, frames, size);
        }
      }
    }
  }
}

}  // namespace

void temporal_attention_cpu(const float* qkv, float* output, const ActivationSizes& sizes,
                            const ActivationStrides& strides, int64_t heads, int threads) {
  const int64_t frames = sizes.frames, pixels = sizes.pixels, channels = sizes.channels;
  const int64_t frame_size = pixels * channels, all_pixels = sizes.clips * pixels;
#pragma omp parallel num_threads(useful_threads(threads, frames * channels * all_pixels))
  {
    Scratch scratch(frames, heads, channels / heads);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < all_pixels; ++i) {
      const int64_t clip = i / pixels, pixel = i % pixels;
      attend(qkv + clip * strides.clip + pixel * strides.pixel, strides.frame,
             output + clip * frames * frame_size + pixel * channels, frame_size, frames, heads, channels / heads,
             scratch);
    }
  }
}

}  // namespace vpf
