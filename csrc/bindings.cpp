// The Python module _C. It knows no torch: tensors come as addresses, sizes and strides, checked by ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "ddim_step.h"
#include "feed_forward.h"
#include "geglu.h"
#include "group_norm_silu.h"
#include "guided_update.h"
#include "linear_residual.h"
#include "matrix_product.h"
#include "temporal_attention.h"
#include "temporal_conv.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using SixNumbers = std::array<int64_t, 6>;
using AddressAndStrides = std::pair<std::uintptr_t, SixNumbers>;

vpf::Sizes to_sizes(const SixNumbers& s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

template <typename T>
vpf::Latents<T> to_latents(const AddressAndStrides& tensor) {
  const auto& [address, s] = tensor;
  return {pointer<T>(address), s[0], s[1], s[2], s[3], s[4], s[5]};
}

void ddim_step_cpu(const AddressAndStrides& latents, const AddressAndStrides& noise,
                   const AddressAndStrides& coefficients, const AddressAndStrides& output, const SixNumbers& sizes,
                   int threads) {
  vpf::ddim_step_cpu(to_latents<const float>(latents), to_latents<const float>(noise),
                     to_latents<const float>(coefficients), to_latents<float>(output), to_sizes(sizes), threads);
}

void guided_update_cpu(const AddressAndStrides& latents, const AddressAndStrides& noise,
                       const AddressAndStrides& target, const AddressAndStrides& flow,
                       const AddressAndStrides& coefficients, const AddressAndStrides& output, const SixNumbers& sizes,
                       double spatial_weight, double temporal_weight, int threads) {
  const vpf::Sizes shape = to_sizes(sizes);
  vpf::guided_update_cpu(to_latents<const float>(latents), to_latents<const float>(noise),
                         to_latents<const float>(target), to_latents<const float>(flow),
                         to_latents<const float>(coefficients), to_latents<float>(output), shape,
                         vpf::make_weights(shape, spatial_weight, temporal_weight), threads);
}

vpf::ActivationSizes to_activation_sizes(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }

vpf::ActivationStrides to_activation_strides(const std::array<int64_t, 3>& s) { return {s[0], s[1], s[2]}; }

void temporal_attention_cpu(std::uintptr_t qkv, std::uintptr_t output, const std::array<int64_t, 4>& sizes,
                            const std::array<int64_t, 3>& strides, int64_t heads, int threads) {
  vpf::temporal_attention_cpu(pointer<const float>(qkv), pointer<float>(output), to_activation_sizes(sizes),
                              to_activation_strides(strides), heads, threads);
}

void norm_temporal_attention_cpu(std::uintptr_t x, std::uintptr_t norm_weight, std::uintptr_t norm_bias,
                                 std::uintptr_t weight, std::uintptr_t position, std::uintptr_t output,
                                 const std::array<int64_t, 4>& sizes, const std::array<int64_t, 3>& strides,
                                 int64_t channels, int64_t heads, double eps, int width, int threads) {
  vpf::norm_temporal_attention_cpu(pointer<const float>(x), pointer<const float>(norm_weight),
                                   pointer<const float>(norm_bias), pointer<const float>(weight),
                                   pointer<const float>(position), pointer<float>(output), to_activation_sizes(sizes),
                                   to_activation_strides(strides), channels, heads, eps, width, threads);
}

void linear_residual_cpu(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t residual,
                         std::uintptr_t output, int64_t rows, int64_t inputs, int64_t outputs, int64_t row_stride,
                         int64_t residual_stride, int width, int threads) {
  vpf::linear_residual_cpu(pointer<const float>(x), row_stride, pointer<const float>(weight),
                           pointer<const float>(bias), pointer<const float>(residual), residual_stride,
                           pointer<float>(output), rows, inputs, outputs, width, threads);
}

void geglu_cpu(std::uintptr_t x, std::uintptr_t output, int64_t rows, int64_t channels, int64_t row_stride,
               int threads) {
  vpf::geglu_cpu(pointer<const float>(x), pointer<float>(output), rows, channels, row_stride, threads);
}

void linear_geglu_cpu(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t output, int64_t rows,
                      int64_t inputs, int64_t channels, int64_t row_stride, int width, int threads) {
  vpf::linear_geglu_cpu(pointer<const float>(x), pointer<const float>(weight), pointer<const float>(bias),
                        pointer<float>(output), rows, inputs, channels, row_stride, width, threads);
}

void feed_forward_cpu(std::uintptr_t x, std::uintptr_t norm_weight, std::uintptr_t norm_bias, std::uintptr_t weight,
                      std::uintptr_t bias, std::uintptr_t out_weight, std::uintptr_t out_bias, std::uintptr_t output,
                      int64_t rows, int64_t channels, int64_t hidden, int64_t row_stride, double eps, int width,
                      int threads) {
  vpf::feed_forward_cpu(pointer<const float>(x), row_stride, pointer<const float>(norm_weight),
                        pointer<const float>(norm_bias), pointer<const float>(weight), pointer<const float>(bias),
                        pointer<const float>(out_weight), pointer<const float>(out_bias), pointer<float>(output), rows,
                        channels, hidden, eps, width, threads);
}

void temporal_conv_cpu(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t residual,
                       std::uintptr_t output, const std::array<int64_t, 4>& sizes,
                       const std::array<int64_t, 3>& residual_strides, int64_t outputs, int width, int threads) {
  vpf::temporal_conv_cpu(pointer<const float>(x), pointer<const float>(weight), pointer<const float>(bias),
                         pointer<const float>(residual), to_activation_strides(residual_strides),
                         pointer<float>(output), to_activation_sizes(sizes), outputs, width, threads);
}

void group_norm_silu_cpu(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t embedding,
                         std::uintptr_t output, const std::array<int64_t, 4>& sizes,
                         const std::array<int64_t, 3>& strides, int64_t groups, double eps, bool over_frames, bool silu,
                         int threads) {
  vpf::group_norm_silu_cpu(pointer<const float>(x), pointer<const float>(weight), pointer<const float>(bias),
                           pointer<const float>(embedding), pointer<float>(output), to_activation_sizes(sizes),
                           to_activation_strides(strides), groups, eps, over_frames, silu, threads);
}

#ifdef VPF_HAS_CUDA
vpf::NoiseType to_noise_type(const std::string& dtype) {
  if (dtype == "float32") return vpf::NoiseType::float32;
  if (dtype == "float16") return vpf::NoiseType::float16;
  if (dtype == "bfloat16") return vpf::NoiseType::bfloat16;
  throw std::invalid_argument("noise must be float32, float16 or bfloat16, got " + dtype);
}

void ddim_step_cuda(const AddressAndStrides& latents, const AddressAndStrides& noise,
                    const AddressAndStrides& coefficients, const AddressAndStrides& output, const SixNumbers& sizes,
                    const std::string& noise_dtype, int device, std::uintptr_t stream) {
  vpf::ddim_step_cuda(to_latents<const float>(latents), to_latents<const void>(noise), to_noise_type(noise_dtype),
                      to_latents<const float>(coefficients), to_latents<float>(output), to_sizes(sizes), device,
                      pointer<void>(stream));
}

void guided_update_cuda(const AddressAndStrides& latents, const AddressAndStrides& noise,
                        const AddressAndStrides& target, const AddressAndStrides& flow,
                        const AddressAndStrides& coefficients, const AddressAndStrides& output,
                        const SixNumbers& sizes, double spatial_weight, double temporal_weight,
                        const std::string& noise_dtype, int device, std::uintptr_t stream) {
  const vpf::Sizes shape = to_sizes(sizes);
  vpf::guided_update_cuda(to_latents<const float>(latents), to_latents<const void>(noise), to_noise_type(noise_dtype),
                          to_latents<const float>(target), to_latents<const float>(flow),
                          to_latents<const float>(coefficients), to_latents<float>(output), shape,
                          vpf::make_weights(shape, spatial_weight, temporal_weight), device, pointer<void>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::literals::operator""_a;
  const py::call_guard<py::gil_scoped_release> unlocked;

  m.def("ddim_step_cpu", &ddim_step_cpu, unlocked, "latents"_a, "noise"_a, "coefficients"_a, "output"_a,
        py::kw_only(), "sizes"_a, "threads"_a);
  m.def("guided_update_cpu", &guided_update_cpu, unlocked, "latents"_a, "noise"_a, "target"_a, "flow"_a,
        "coefficients"_a, "output"_a, py::kw_only(), "sizes"_a, "spatial_weight"_a, "temporal_weight"_a, "threads"_a);
  m.def("temporal_attention_cpu", &temporal_attention_cpu, unlocked, "qkv"_a, "output"_a, py::kw_only(), "sizes"_a,
        "strides"_a, "heads"_a, "threads"_a);
  m.def("norm_temporal_attention_cpu", &norm_temporal_attention_cpu, unlocked, "x"_a, "norm_weight"_a, "norm_bias"_a,
        "weight"_a, "position"_a, "output"_a, py::kw_only(), "sizes"_a, "strides"_a, "channels"_a, "heads"_a, "eps"_a,
        "width"_a, "threads"_a);
  m.def("linear_residual_cpu", &linear_residual_cpu, unlocked, "x"_a, "weight"_a, "bias"_a, "residual"_a, "output"_a,
        py::kw_only(), "rows"_a, "inputs"_a, "outputs"_a, "row_stride"_a, "residual_stride"_a, "width"_a,
        "threads"_a);
  m.def("geglu_cpu", &geglu_cpu, unlocked, "x"_a, "output"_a, py::kw_only(), "rows"_a, "channels"_a, "row_stride"_a,
        "threads"_a);
  m.def("linear_geglu_cpu", &linear_geglu_cpu, unlocked, "x"_a, "weight"_a, "bias"_a, "output"_a, py::kw_only(),
        "rows"_a, "inputs"_a, "channels"_a, "row_stride"_a, "width"_a, "threads"_a);
  m.def("feed_forward_cpu", &feed_forward_cpu, unlocked, "x"_a, "norm_weight"_a, "norm_bias"_a, "weight"_a, "bias"_a,
        "out_weight"_a, "out_bias"_a, "output"_a, py::kw_only(), "rows"_a, "channels"_a, "hidden"_a, "row_stride"_a,
        "eps"_a, "width"_a, "threads"_a);
  m.def("temporal_conv_cpu", &temporal_conv_cpu, unlocked, "x"_a, "weight"_a, "bias"_a, "residual"_a, "output"_a,
        py::kw_only(), "sizes"_a, "residual_strides"_a, "outputs"_a, "width"_a, "threads"_a);
  m.def("group_norm_silu_cpu", &group_norm_silu_cpu, unlocked, "x"_a, "weight"_a, "bias"_a, "embedding"_a, "output"_a,
        py::kw_only(), "sizes"_a, "strides"_a, "groups"_a, "eps"_a, "over_frames"_a, "silu"_a, "threads"_a);
  m.attr("vector_width") = vpf::vector_width();
#ifdef VPF_HAS_CUDA
  m.def("ddim_step_cuda", &ddim_step_cuda, unlocked, "latents"_a, "noise"_a, "coefficients"_a, "output"_a,
        py::kw_only(), "sizes"_a, "noise_dtype"_a, "device"_a, "stream"_a);
  m.def("guided_update_cuda", &guided_update_cuda, unlocked, "latents"_a, "noise"_a, "target"_a, "flow"_a,
        "coefficients"_a, "output"_a, py::kw_only(), "sizes"_a, "spatial_weight"_a, "temporal_weight"_a,
        "noise_dtype"_a, "device"_a, "stream"_a);
  m.def("cuda_error", &vpf::cuda_error, unlocked, "device"_a);
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
