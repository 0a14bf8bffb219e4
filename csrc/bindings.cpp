// The Python module _C. It knows no torch: tensors come as addresses, sizes and strides, checked by ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "guided_update.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

vpf::Sizes to_sizes(const std::array<int64_t, 6>& s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

vpf::Strides to_strides(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }

std::vector<vpf::Vote> to_votes(const std::vector<std::array<double, 4>>& coefficients, const vpf::Sizes& sizes) {
  if (static_cast<int64_t>(coefficients.size()) != sizes.votes) {
    throw std::invalid_argument("guided_update needs coefficients for " + std::to_string(sizes.votes) +
                                " votes, got " + std::to_string(coefficients.size()));
  }
  std::vector<vpf::Vote> votes;
  votes.reserve(coefficients.size());
  for (const auto& [sqrt_alpha, sqrt_beta, update, predicts_x0] : coefficients) {
    votes.push_back({static_cast<float>(1 / sqrt_alpha), static_cast<float>(sqrt_beta), static_cast<float>(update),
                     static_cast<float>(predicts_x0)});
  }
  return votes;
}

void guided_update_cpu(std::uintptr_t latents, std::uintptr_t noise, std::uintptr_t target, std::uintptr_t flow,
                       std::uintptr_t output, const std::array<int64_t, 6>& sizes,
                       const std::array<int64_t, 4>& latents_strides, const std::array<int64_t, 4>& noise_strides,
                       const std::array<int64_t, 4>& target_strides,
                       const std::vector<std::array<double, 4>>& coefficients, double spatial_weight,
                       double temporal_weight, int threads) {
  const vpf::Sizes shape = to_sizes(sizes);
  const std::vector<vpf::Vote> votes = to_votes(coefficients, shape);
  vpf::guided_update_cpu(pointer<const float>(latents), pointer<const float>(noise), pointer<const float>(target),
                         pointer<const float>(flow), pointer<float>(output), shape, to_strides(latents_strides),
                         to_strides(noise_strides), to_strides(target_strides), votes.data(),
                         vpf::make_weights(shape, spatial_weight, temporal_weight), threads);
}

#ifdef VPF_HAS_CUDA
vpf::NoiseType to_noise_type(const std::string& dtype) {
  if (dtype == "float32") return vpf::NoiseType::float32;
  if (dtype == "float16") return vpf::NoiseType::float16;
  if (dtype == "bfloat16") return vpf::NoiseType::bfloat16;
  throw std::invalid_argument("noise must be float32, float16 or bfloat16, got " + dtype);
}

void guided_update_cuda(std::uintptr_t latents, std::uintptr_t noise, const std::string& noise_dtype,
                        std::uintptr_t target, std::uintptr_t flow, std::uintptr_t output,
                        const std::array<int64_t, 6>& sizes, const std::array<int64_t, 4>& latents_strides,
                        const std::array<int64_t, 4>& noise_strides, const std::array<int64_t, 4>& target_strides,
                        const std::vector<std::array<double, 4>>& coefficients, double spatial_weight,
                        double temporal_weight, int device, std::uintptr_t stream) {
  const vpf::Sizes shape = to_sizes(sizes);
  const std::vector<vpf::Vote> votes = to_votes(coefficients, shape);
  vpf::guided_update_cuda(pointer<const float>(latents), pointer<const void>(noise), to_noise_type(noise_dtype),
                          pointer<const float>(target), pointer<const float>(flow), pointer<float>(output), shape,
                          to_strides(latents_strides), to_strides(noise_strides), to_strides(target_strides),
                          votes.data(), vpf::make_weights(shape, spatial_weight, temporal_weight), device,
                          pointer<void>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::literals::operator""_a;
  const py::call_guard<py::gil_scoped_release> unlocked;

  m.def("guided_update_cpu", &guided_update_cpu, unlocked, "latents"_a, "noise"_a, "target"_a, "flow"_a, "output"_a,
        py::kw_only(), "sizes"_a, "latents_strides"_a, "noise_strides"_a, "target_strides"_a, "coefficients"_a,
        "spatial_weight"_a, "temporal_weight"_a, "threads"_a);
#ifdef VPF_HAS_CUDA
  m.def("guided_update_cuda", &guided_update_cuda, unlocked, "latents"_a, "noise"_a, "noise_dtype"_a, "target"_a,
        "flow"_a, "output"_a, py::kw_only(), "sizes"_a, "latents_strides"_a, "noise_strides"_a, "target_strides"_a,
        "coefficients"_a, "spatial_weight"_a, "temporal_weight"_a, "device"_a, "stream"_a);
  m.def("cuda_error", &vpf::cuda_error, unlocked, "device"_a);
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
