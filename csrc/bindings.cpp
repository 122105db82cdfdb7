// The pybind11 module _C: what Python asks of the native half beside its operators.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = std::string(__VERSION__);
  info["cplusplus"] = static_cast<long>(__cplusplus);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and test primitives of entropy_kernels' native half.";
  m.def("build_info", &build_info, "Compiler and language version of this build.");
}
