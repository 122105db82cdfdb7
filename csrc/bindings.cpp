// The pybind11 module _C: primitives of csrc/common for tests. Built in place only (make, pip install -e), never
// into a wheel: it is of one Python version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <iterator>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "common/philox.h"
#include "common/softmax_state.h"

namespace py = pybind11;

namespace {

using entropy_kernels::SoftmaxState;
using State = std::array<double, 6>;  // m, s, w, x_y, s2, w2

template <typename T>
SoftmaxState<T> unpack(const State& f) {
  return {T(f[0]), T(f[1]), T(f[2]), T(f[3]), T(f[4]), T(f[5])};
}

template <typename T>
State merge(const State& a, const State& b, double temperature) {
  const SoftmaxState<T> r = entropy_kernels::merge(unpack<T>(a), unpack<T>(b), T(temperature));
  return {r.m, r.s, r.w, r.x_y, r.s2, r.w2};
}

// name, second_order, differentiable
std::vector<std::tuple<std::string, bool, bool>> statistics() {
  std::vector<std::tuple<std::string, bool, bool>> table;
  for (const auto& row : entropy_kernels::kStatisticTraits) {
    table.emplace_back(row.name, row.second_order, row.differentiable);
  }
  return table;
}

template <typename T>
std::vector<double> finalize(const State& state, double temperature) {
  const auto stats = entropy_kernels::finalize(unpack<T>(state), T(temperature));
  return {std::begin(stats.values), std::end(stats.values)};
}

template <typename T>
std::array<double, 3> gradient_coefficients(const State& state, double temperature,
                                            const std::map<std::string, double>& grads) {
  entropy_kernels::TokenStats<T> upstream = {};
  for (int i = 0; i < entropy_kernels::kStatistics; ++i) {
    const auto grad = grads.find(entropy_kernels::kStatisticTraits[i].name);
    if (grad != grads.end()) upstream[i] = T(grad->second);
  }
  const auto r = entropy_kernels::gradient_coefficients(unpack<T>(state), T(temperature), upstream);
  return {r.constant, r.linear, r.quadratic};
}

std::array<uint32_t, 4> philox4x32_10(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const entropy_kernels::Philox4x32 words{{counter[0], counter[1], counter[2], counter[3]}};
  const entropy_kernels::Philox4x32 out = entropy_kernels::philox4x32_10(words, key[0], key[1]);
  return {out.word[0], out.word[1], out.word[2], out.word[3]};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Primitives of entropy_kernels' native half, for its tests.";
  m.def("statistics", &statistics, "Per statistic, in the order of the bits: name, second_order, differentiable.");
  // The primitives of csrc/common/softmax_state.h in double and in float, for tests; states are (m, s, w, x_y, s2, w2).
  m.def("merge", &merge<double>, py::arg("a"), py::arg("b"), py::arg("temperature"));
  m.def("merge_float", &merge<float>, py::arg("a"), py::arg("b"), py::arg("temperature"));
  m.def("finalize", &finalize<double>, py::arg("state"), py::arg("temperature"));
  m.def("finalize_float", &finalize<float>, py::arg("state"), py::arg("temperature"));
  m.def("gradient_coefficients", &gradient_coefficients<double>, py::arg("state"), py::arg("temperature"),
        py::arg("grads"));
  m.def("gradient_coefficients_float", &gradient_coefficients<float>, py::arg("state"), py::arg("temperature"),
        py::arg("grads"));
  m.def("philox4x32_10", &philox4x32_10, "Four output words of Philox4x32-10 for four counter and two key words.",
        py::arg("counter"), py::arg("key"));
}
