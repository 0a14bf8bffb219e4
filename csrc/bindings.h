// How an op's .cpp file makes its functions callable from Python, which passes tensors as addresses, sizes and strides.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "activations.h"
#include "latents.h"

namespace vpf {

using Define = void (*)(pybind11::module_&);

// The functions that bindings.cpp calls to fill the module.
inline std::vector<Define>& definitions() {
  static std::vector<Define> all;
  return all;
}

// A constant of this type in an op's file adds one of those functions, when the shared library is loaded.
struct Binding {
  explicit Binding(Define define) { definitions().push_back(define); }
};

// Converts what pybind11 makes of a Python value, `type`, to an argument of a C++ function. Numbers stay as they are.
template <typename T>
struct FromPython {
  using type = T;
  static T convert(T value) { return value; }
};

template <typename T>
struct FromPython<T*> {
  using type = std::uintptr_t;
  static T* convert(type address) { return reinterpret_cast<T*>(address); }
};

template <typename T>
struct FromPython<const Latents<T>&> {
  using type = std::pair<std::uintptr_t, std::array<int64_t, 6>>;
  static Latents<T> convert(const type& tensor) {
    const auto& [address, s] = tensor;
    return {FromPython<T*>::convert(address), s[0], s[1], s[2], s[3], s[4], s[5]};
  }
};

template <>
struct FromPython<const Sizes&> {
  using type = std::array<int64_t, 6>;
  static Sizes convert(const type& s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }
};

template <>
struct FromPython<const ActivationSizes&> {
  using type = std::array<int64_t, 4>;
  static ActivationSizes convert(const type& s) { return {s[0], s[1], s[2], s[3]}; }
};

template <>
struct FromPython<const ActivationStrides&> {
  using type = std::array<int64_t, 3>;
  static ActivationStrides convert(const type& s) { return {s[0], s[1], s[2]}; }
};

template <>
struct FromPython<NoiseType> {
  using type = std::string;
  static NoiseType convert(const type& dtype) {
    if (dtype == "float32") return NoiseType::float32;
    if (dtype == "float16") return NoiseType::float16;
    if (dtype == "bfloat16") return NoiseType::bfloat16;
    throw std::invalid_argument("noise must be float32, float16 or bfloat16, got " + dtype);
  }
};

// m.def(name, function, names of the arguments...), with the arguments as Python passes them and the GIL released.
template <typename Result, typename... Arguments, typename... Names>
void define(pybind11::module_& m, const char* name, Result (*function)(Arguments...), const Names&... names) {
  m.def(
      name,
      [function](const typename FromPython<Arguments>::type&... values) {
        return function(FromPython<Arguments>::convert(values)...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>(), names...);
}

}  // namespace vpf
