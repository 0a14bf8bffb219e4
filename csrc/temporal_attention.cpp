#include "temporal_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings.h"
#include "layer_norm.h"
#include "matrix_product.h"
#include "vector_math.h"

namespace vpf {
namespace {

// Queries that are scored together, one in each lane of a vector, so that no sum or maximum goes across lanes.
constexpr int64_t kLanes = 16;
// Keys per load of the lanes' queries, and queries per load of a value's channels: enough independent sums to hide the
// latency of a multiply-add.
constexpr int64_t kBlock = 8;
// Floats of queries, keys and values that are copied together (128 KiB), so that whole cache lines are read in order.
constexpr int64_t kCopied = 32768;

// Buffers for one pixel: queries, keys and values of `heads` heads at a time are copied here, because the frames of a
// clip are often a multiple of 4 KiB apart and then evict each other from the cache. The last block of keys is padded
// with zeros; the last channels of a value are padded with what follows them.
struct Scratch {
  Scratch(int64_t frames, int64_t heads, int64_t size)
      : heads(std::clamp<int64_t>(kCopied / (3 * frames * size), 1, heads)),
        rows(floats((frames + kBlock) * 3 * this->heads * size + kLanes)),
        queries(floats(size * kLanes)),
        weights(floats((frames + kBlock) * kLanes)) {}

  int64_t heads;
  std::vector<float> rows, queries, weights;  // [frames, 3, heads, size], [size, kLanes], [frames, kLanes]
};

using Queries = Lanes<kLanes>;  // one number per query

// weights = keys x queries. Returns the largest score of each query.
VPF_ALWAYS_INLINE Queries score(const float* __restrict queries, const float* __restrict keys, int64_t stride,
                                float* __restrict weights, int64_t frames, int64_t size) {
  Queries most = {};
  for (int64_t key = 0; key < frames; key += kBlock) {
    const float* rows = keys + key * stride;
    Queries sums[kBlock] = {};
    for (int64_t c = 0; c < size; ++c) {
      const Queries query = load_lanes<kLanes>(queries + c * kLanes);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kBlock; ++i) sums[i] += query * rows[i * stride + c];
    }
    if (key == 0) most = sums[0];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kBlock; ++i) {
      store_lanes<kLanes>(weights + (key + i) * kLanes, sums[i], kLanes);
      if (key + i < frames) most = most < sums[i] ? sums[i] : most;
    }
  }
  return most;
}

// Replaces scores by exp(score - most), the softmax's numerators. Returns one over their sum over the keys.
VPF_ALWAYS_INLINE Queries weigh(float* __restrict weights, const Queries& most, int64_t frames) {
  Queries sum = {};
  const Queries limit = Queries{} + 88.f;
  for (int64_t key = 0; key < frames; ++key) {
    const Queries below = most - load_lanes<kLanes>(weights + key * kLanes);
    const Queries weight = exp_of_negative(1.f, below > limit ? limit : below, kNothing);
    store_lanes<kLanes>(weights + key * kLanes, weight, kLanes);
    sum += weight;
  }
  return 1.f / sum;
}

// output = weights x values x inverse, for `count` of the lanes' queries. kWidth channels fill a vector.
template <int kWidth>
VPF_ALWAYS_INLINE void average(const float* __restrict weights, const float* __restrict values, int64_t stride,
                               const Queries& inverse, float* __restrict output, int64_t output_stride, int64_t count,
                               int64_t frames, int64_t size) {
  for (int64_t query = 0; query < count; query += kBlock) {
    for (int64_t channel = 0; channel < size; channel += kWidth) {
      Lanes<kWidth> sums[kBlock] = {};
      for (int64_t key = 0; key < frames; ++key) {
        const Lanes<kWidth> value = load_lanes<kWidth>(values + key * stride + channel);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kBlock; ++i) sums[i] += value * weights[key * kLanes + query + i];
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < kBlock; ++i) {
        if (query + i >= count) break;
        store_lanes<kWidth>(output + (query + i) * output_stride + channel, sums[i] * inverse[query + i],
                            size - channel);
      }
    }
  }
}

// Attention of one pixel. `qkv` and `output` point at its first frame; strides are the elements between frames.
VPF_VECTOR_CLONES void attend(const float* qkv, int64_t qkv_stride, float* output, int64_t output_stride,
                              int64_t frames, int64_t heads, int64_t size, Scratch& scratch) {
  const float scale = 1.f / std::sqrt(static_cast<float>(size));
  float* __restrict rows = scratch.rows.data();
  float* __restrict queries = scratch.queries.data();
  float* weights = scratch.weights.data();
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
        const Queries most = score(queries, q + part, row_size, weights, frames, size);
        const Queries inverse = weigh(weights, most, frames);
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

struct NormAttention {
  const float *x, *norm_weight, *norm_bias, *position;
  float* output;
  const ActivationSizes& sizes;
  const ActivationStrides& strides;
  const Panels& panels;
  int64_t channels, heads, pixels;  // pixels: the number per block
  float eps;

  int64_t blocks() const { return (sizes.pixels + pixels - 1) / pixels; }
};

// All frames of a block of pixels are normalized, multiplied and attended to while they are in the L2 cache.
struct NormAttentionWork {
  explicit NormAttentionWork(const NormAttention& op)
      : op(op),
        tokens(floats(op.sizes.frames * op.pixels * op.sizes.channels)),
        qkv(floats(op.sizes.frames * op.pixels * 3 * op.channels)),
        attention(op.sizes.frames, op.heads, op.channels / op.heads) {}

  template <int kWidth>
  VPF_ALWAYS_INLINE void run(int64_t i) {
    const int64_t frames = op.sizes.frames, inputs = op.sizes.channels, outputs = 3 * op.channels;
    const int64_t clip = i / op.blocks(), first = i % op.blocks() * op.pixels;
    const int64_t here = std::min(op.pixels, op.sizes.pixels - first);
    for (int64_t row = 0; row < frames * here; ++row) {
      const int64_t frame = row / here, pixel = first + row % here;
      float* token = tokens.data() + row * inputs;
      layer_norm(op.x + clip * op.strides.clip + frame * op.strides.frame + pixel * op.strides.pixel, op.norm_weight,
                 op.norm_bias, op.eps, inputs, token);
      for (int64_t c = 0; op.position && c < inputs; ++c) token[c] += op.position[frame * inputs + c];
    }
    const WriteRows<kWidth> write = {nullptr, 0, qkv.data(), outputs};
    multiply<kWidth>({{tokens.data(), nullptr, nullptr}, inputs, frames * here}, op.panels, write);
    for (int64_t pixel = 0; pixel < here; ++pixel) {
      attend(qkv.data() + pixel * outputs, here * outputs,
             op.output + (clip * frames * op.sizes.pixels + first + pixel) * op.channels, op.sizes.pixels * op.channels,
             frames, op.heads, op.channels / op.heads, attention);
    }
  }

  const NormAttention& op;
  std::vector<float> tokens, qkv;  // [frames, pixels, inputs], [frames, pixels, 3, channels]
  Scratch attention;
};

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

void norm_temporal_attention_cpu(const float* x, const float* norm_weight, const float* norm_bias, const float* weight,
                                 const float* position, float* output, const ActivationSizes& sizes,
                                 const ActivationStrides& strides, int64_t channels, int64_t heads, double eps,
                                 int width, int threads) {
  const int64_t rows = sizes.clips * sizes.frames * sizes.pixels;
  threads = product_threads(threads, rows, 3 * channels, sizes.channels);
  const Panels panels(weight, nullptr, 1, 3 * channels, sizes.channels, false, width, threads);
  const int64_t pixels = std::clamp<int64_t>(kBlockRows / sizes.frames, 1, sizes.pixels);
  const NormAttention op = {x,       norm_weight, norm_bias, position, output, sizes,
                            strides, panels,      channels,  heads,    pixels, static_cast<float>(eps)};
#pragma omp parallel num_threads(threads)
  {
    NormAttentionWork work(op);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < sizes.clips * op.blocks(); ++i) run(work, i, width);
  }
}

namespace {

using pybind11::literals::operator""_a;

const Binding binding([](pybind11::module_& m) {
  define(m, "temporal_attention_cpu", &temporal_attention_cpu, "qkv"_a, "output"_a, pybind11::kw_only(), "sizes"_a,
         "strides"_a, "heads"_a, "threads"_a);
  define(m, "norm_temporal_attention_cpu", &norm_temporal_attention_cpu, "x"_a, "norm_weight"_a, "norm_bias"_a,
         "weight"_a, "position"_a, "output"_a, pybind11::kw_only(), "sizes"_a, "strides"_a, "channels"_a, "heads"_a,
         "eps"_a, "width"_a, "threads"_a);
});

}  // namespace

}  // namespace vpf
