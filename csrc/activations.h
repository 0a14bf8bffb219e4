// Sizes, strides and threads of the ops on the models' activations (clips, frames, pixels, channels).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace vpf {

struct ActivationSizes {
  int64_t clips, frames, pixels, channels;
};

// Elements between neighbors along each dimension; the channels of one pixel are contiguous.
struct ActivationStrides {
  int64_t clip, frame, pixel;
};

inline std::vector<float> floats(int64_t size) { return std::vector<float>(static_cast<std::size_t>(size)); }

// The number of threads, `threads` at most, for an elementwise op on `values` numbers: waking one takes microseconds.
inline int useful_threads(int threads, int64_t values) {
  constexpr int64_t kValuesPerThread = 16384;
  return static_cast<int>(std::clamp<int64_t>(values / kValuesPerThread, 1, std::max(threads, 1)));
}

}  // namespace vpf
