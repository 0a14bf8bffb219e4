// The Python module _C. It knows no torch: ops/<op>.py checks the tensors. Each op's .cpp file binds its own functions.
#include "bindings.h"

#include "guided_update.h"
#include "matrix_product.h"

PYBIND11_MODULE(_C, m) {
  for (const vpf::Define define : vpf::definitions()) define(m);
  m.attr("vector_width") = vpf::vector_width();
#ifdef VPF_HAS_CUDA
  vpf::define(m, "cuda_error", &vpf::cuda_error, pybind11::arg("device"));
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
