// Rows times a weight matrix in float32. A function object, `finish`, takes each piece of the result while it
// is in registers, so that a residual or a gate costs no pass over memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "activations.h"
#include "vector_math.h"

namespace vpf {

// Floats in the widest vector of this processor: 16, 8 or 4.
int vector_width();

// The number of threads, `threads` at most, for a product.
int product_threads(int threads, int64_t rows, int64_t outputs, int64_t inputs);

// Weights (taps, outputs, inputs) and biases in the order in which a product reads them: panels of two vectors,
// [taps, panels, inputs, 2, width], the last panel padded with zeros. The two vectors hold consecutive outputs; with
// `gated`, `width` outputs of the first half and the corresponding ones of the second half.
struct Panels {
  // bias: (outputs,) or nullptr for none. width: floats per vector, up to vector_width().
  Panels(const float* weight, const float* bias, int64_t taps, int64_t outputs, int64_t inputs, bool gated, int width,
         int threads);

  const float* weight(int64_t tap, int64_t panel) const {
    return weights.data() + (tap * count + panel) * inputs * 2 * width;
  }
  const float* bias(int64_t panel) const { return biases.data() + panel * 2 * width; }

  int64_t inputs, width, count;
  std::vector<float> weights, biases;
};

// Rows per block: enough to amortize loading each weight panel, and few enough that the block stays in the L2 cache.
constexpr int64_t kBlockRows = 144;

// The input rows of each tap, `stride` elements apart; nullptr stands for zeros.
struct RowBlock {
  const float* taps[3];
  int64_t stride, rows;
};

// `rows` cut into blocks of at most kBlockRows, small enough that every thread gets one.
struct Blocks {
  Blocks(int64_t rows, int threads);

  int64_t first(int64_t block) const { return block * size; }
  int64_t length(int64_t block) const { return std::min(size, rows - first(block)); }

  int64_t rows, size, count;
};

template <int kRows, int kWidth, class Finish>
VPF_ALWAYS_INLINE int64_t multiply_rows(const RowBlock& block, const Panels& panels, int64_t panel, int64_t first,
                                        const Finish& finish) {
  for (; first + kRows <= block.rows; first += kRows) {
    Lanes<kWidth> sums[kRows][2] = {};
    for (int64_t tap = 0; tap < 3; ++tap) {
      if (!block.taps[tap]) continue;
      const float* __restrict rows = block.taps[tap] + first * block.stride;
      const float* __restrict weights = panels.weight(tap, panel);
      for (int64_t k = 0; k < panels.inputs; ++k) {
        const Lanes<kWidth> left = load_lanes<kWidth>(weights + 2 * kWidth * k);
        const Lanes<kWidth> right = load_lanes<kWidth>(weights + 2 * kWidth * k + kWidth);
#pragma GCC unroll 12
        for (int row = 0; row < kRows; ++row) {
          sums[row][0] += rows[row * block.stride + k] * left;
          sums[row][1] += rows[row * block.stride + k] * right;
        }
      }
    }
    const Lanes<kWidth> left = load_lanes<kWidth>(panels.bias(panel));
    const Lanes<kWidth> right = load_lanes<kWidth>(panels.bias(panel) + kWidth);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      sums[row][0] += left;
      sums[row][1] += right;
      finish(first + row, panel, sums[row]);
    }
  }
  return first;
}

// finish(row, panel, pair of sums) for each row of a block and each panel.
template <int kWidth, class Finish>
VPF_ALWAYS_INLINE void multiply(const RowBlock& block, const Panels& panels, const Finish& finish) {
  constexpr int kRows = kWidth == 16 ? 12 : 6;  // two sums a row: 24 of 32, or 12 of 16 vector registers
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    int64_t row = multiply_rows<kRows, kWidth>(block, panels, panel, 0, finish);
    row = multiply_rows<4, kWidth>(block, panels, panel, row, finish);
    multiply_rows<1, kWidth>(block, panels, panel, row, finish);
  }
}

// A finish that adds a residual, unless it is nullptr, and writes rows of `columns` outputs.
template <int kWidth>
struct WriteRows {
  VPF_ALWAYS_INLINE void operator()(int64_t row, int64_t panel, const Lanes<kWidth> (&sums)[2]) const {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t column = (2 * panel + half) * kWidth, count = columns - column;
      if (count <= 0) break;
      Lanes<kWidth> sum = sums[half];
      if (residual) sum += load_lanes<kWidth>(residual + row * residual_stride + column, count);
      store_lanes<kWidth>(output + row * columns + column, sum, count);
    }
  }

  const float* residual;
  int64_t residual_stride;
  float* output;
  int64_t columns;
};

// The finish of gated weights: writes rows of `channels` outputs, values of the first half times GELU of the second.
template <int kWidth>
struct WriteGated {
  VPF_ALWAYS_INLINE void operator()(int64_t row, int64_t panel, const Lanes<kWidth> (&sums)[2]) const {
    float values[kWidth], gates[kWidth];
    store_lanes<kWidth>(values, sums[0], kWidth);
    store_lanes<kWidth>(gates, sums[1], kWidth);
    float* to = output + row * channels + panel * kWidth;
    const int64_t count = channels - panel * kWidth;
    if (count >= kWidth) {
#pragma omp simd
      for (int c = 0; c < kWidth; ++c) to[c] = values[c] * gelu(gates[c]);
    } else {
      for (int64_t c = 0; c < count; ++c) to[c] = values[c] * gelu(gates[c]);
    }
  }

  float* output;
  int64_t channels;
};

#if defined(__GNUC__) && defined(__x86_64__)
#define VPF_TARGET(name) __attribute__((target(name)))
#else
#define VPF_TARGET(name)
#endif

template <class Work>
VPF_TARGET("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma") void run_16(Work& work, int64_t i) {
  work.template run<16>(i);
}

template <class Work>
VPF_TARGET("avx2,fma") void run_8(Work& work, int64_t i) {
  work.template run<8>(i);
}

// work.run<kWidth>(i), compiled for processors with vectors of kWidth floats. `run` is inlined into each version.
template <class Work>
void run(Work& work, int64_t i, int64_t width) {
  if (width == 16) return run_16(work, i);
  if (width == 8) return run_8(work, i);
  work.template run<4>(i);
}

}  // namespace vpf
