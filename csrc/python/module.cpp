// Host-only facts for Python. No tensors pass here: those go through the op registry.

#include <pybind11/pybind11.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the build and this processor";
  m.def("cpu_isa", [] { return std::string(qk::cpu::name_of(qk::cpu::chosen_isa())); }, "The instruction set whose kernels run here");
  m.attr("version") = QK_VERSION;
  m.attr("torch_target") = QK_TORCH_TARGET;
  m.attr("compiler") = QK_COMPILER;
  m.attr("cuda_archs") = QK_CUDA_ARCH_LIST;
  m.attr("cuda_reason") = QK_CUDA_REASON;
}
