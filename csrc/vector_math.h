// exp, SiLU and GELU in float32 as branchless arithmetic, which a compiler turns into vector code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

// Stands before a function with inner loops: the compiler makes versions for AVX-512, for AVX2 and for any processor,
// and the loader picks one. Not under sanitizers, whose run-time does not support such a choice at load time.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__) && !defined(VPF_SANITIZE)
#if __GNUC__ >= 12
#define VPF_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VPF_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define VPF_VECTOR_CLONES
#endif

// Stands before what such a function calls: only inlined code is compiled for each of its versions.
#ifdef __GNUC__
#define VPF_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define VPF_ALWAYS_INLINE inline
#endif

namespace vpf {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A vector of kWidth floats; the compiler splits it where the processor's vectors are shorter.
template <int kWidth>
using Lanes __attribute__((vector_size(kWidth * sizeof(float)), aligned(sizeof(float)), may_alias)) = float;

template <int kWidth>
VPF_ALWAYS_INLINE Lanes<kWidth> load_lanes(const float* from) {
  return *reinterpret_cast<const Lanes<kWidth>*>(from);
}

// These two read or write only the first `count` lanes if count < kWidth.
template <int kWidth>
VPF_ALWAYS_INLINE Lanes<kWidth> load_lanes(const float* from, int64_t count) {
  if (count >= kWidth) return load_lanes<kWidth>(from);
  Lanes<kWidth> lanes = {};
  for (int64_t c = 0; c < count; ++c) lanes[c] = from[c];
  return lanes;
}

template <int kWidth>
VPF_ALWAYS_INLINE void store_lanes(float* to, const Lanes<kWidth>& lanes, int64_t count) {
  if (count >= kWidth) {
    *reinterpret_cast<Lanes<kWidth>*>(to) = lanes;
  } else {
    for (int64_t c = 0; c < count; ++c) to[c] = lanes[c];
  }
}

// 2^n for a float whose lowest bits hold n + 127; 0 for n = -127.
VPF_ALWAYS_INLINE float power_of_two(float rounded) { return float_of(bits_of(rounded) << 23); }

template <class Vector>
VPF_ALWAYS_INLINE Vector power_of_two(const Vector& rounded) {
  using Integers = decltype(rounded < rounded);
  return reinterpret_cast<Vector>(reinterpret_cast<Integers>(rounded) << 23);
}

// exp(-scale (high + low)) to 1 ulp for 0 <= scale high <= 88 and scale |low| < 0.05; 0 for scale high > 87.7.
// scale is a constant, and a power of two.
template <class Float, class Low>
VPF_ALWAYS_INLINE Float exp_of_negative(float scale, Float high, Low low) {
  constexpr float kInverseLog2 = 1.44269504f;
  // log(2) in two parts: a multiple of the first by up to 127 is exact.
  constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  // Adding kRound to a number leaves its nearest integer plus 127 in the lowest bits of the sum.
  constexpr float kRound = 12582912.f + 127.f;
  const Float rounded = kRound - high * (scale * kInverseLog2);
  const Float n = rounded - kRound;
  const Float r = high + n * (kLog2High / scale) + n * (kLog2Low / scale) + low;  // scale |r| < 0.4
  // Minimax fit of (exp(x) - 1 - x) / x^2 for x = -scale r.
  Float p = 0.00137904705f * (scale * scale * scale * scale * scale * scale) * r;
  p = p - 0.00838041306f * (scale * scale * scale * scale * scale);
  p = p * r + 0.0416697077f * (scale * scale * scale * scale);
  p = p * r - 0.166664079f * (scale * scale * scale);
  p = p * r + 0.499999851f * (scale * scale);
  p = p * r - scale;
  p = p * r + 1.f;
  return power_of_two(rounded) * p;
}

// x + kNothing is x for every x (x + 0 is not, for x = -0), so that the compiler can leave the sum out.
constexpr float kNothing = -0.f;

// The smaller of |x| and `most`; `most` for NaN.
inline float magnitude_up_to(float most, float x) {
  return float_of(std::min(bits_of(x) & 0x7fffffffu, bits_of(most)));  // floats from 0 on sort as their bits
}

inline float silu(float x) {
  const float e = exp_of_negative(1.f, magnitude_up_to(88.f, x), kNothing);
  return x * ((x < 0.f ? e : 1.f) / (1.f + e));
}

// x Phi(x), with Phi(-a) = exp(-a^2 / 2) R(a) for a >= 0: without cancellation, the negative tail is accurate too.
inline float gelu(float x) {
  const float a = magnitude_up_to(13.25f, x);  // Phi(-13.25) is 0 in float32
  // a^2 in two parts, the first exact: exp would magnify the rounding error of a large square.
  const float high = float_of(bits_of(a) & 0xfffff000u);
  const float gauss = exp_of_negative(0.5f, high * high, (a - high) * (a + high));
  // Minimax fit of R on [0, 14].
  float numerator = 0.0040776518f;
  numerator = numerator * a + 0.0403728346f;
  numerator = numerator * a + 0.1824626569f;
  numerator = numerator * a + 0.4372520117f;
  numerator = numerator * a + 0.5f;
  float denominator = 0.0102210285f;
  denominator = denominator * a + 0.1012064985f;
  denominator = denominator * a + 0.4674312822f;
  denominator = denominator * a + 1.1992941406f;
  denominator = denominator * a + 1.6723889788f;
  denominator = denominator * a + 1.f;
  return (x < 0.f ? 0.f : x) - a * (gauss * (numerator / denominator));
}

}  // namespace vpf
