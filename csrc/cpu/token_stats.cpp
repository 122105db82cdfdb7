// The operators token_stats_forward and token_stats_backward on the CPU: arguments, work sharing, targets. What happens
// inside a row is in token_stats_kernel.h.
#include "token_stats.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "../token_stats_arguments.h"
#include "parallel.h"

namespace entropy_kernels::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A row's state is that of its parts of so many columns, merged in their order, whoever reads which: so a row gives the
// same bits for any number of rows and of threads. With fewer rows than kFewRows threads share the parts of a row, else
// one has them all.
constexpr std::int64_t kPartColumns = 16384;
constexpr std::int64_t kFewRows = 256;
// A gradient of this size or more that goes into memory of its own is written past the caches.
constexpr std::int64_t kLargeBytes = std::int64_t(16) << 20;

double load(const void* p, Element element) {
  switch (element) {
    case Element::kFloat64:
      return *static_cast<const double*>(p);
    case Element::kBFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::BFloat16*>(p));
    case Element::kFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::Half*>(p));
    default:
      return *static_cast<const float*>(p);
  }
}

void store(void* p, Element element, double value) {
  switch (element) {
    case Element::kFloat64:
      *static_cast<double*>(p) = value;
      break;
    case Element::kBFloat16:
      *static_cast<torch::headeronly::BFloat16*>(p) = static_cast<float>(value);
      break;
    case Element::kFloat16:
      *static_cast<torch::headeronly::Half*>(p) = static_cast<float>(value);
      break;
    default:
      *static_cast<float*>(p) = static_cast<float>(value);
  }
}

// A (B, L, V) tensor as plain numbers, for the threads: a stable tensor answers through a C interface each time.
struct Matrix {
  char* data;
  std::int64_t length, batch_stride, length_stride, column_stride;  // strides in elements
  std::int64_t element_size;

  Matrix(const Tensor& tensor, void* pointer)
      : data(static_cast<char*>(pointer)),
        length(tensor.size(1)),
        batch_stride(tensor.stride(0)),
        length_stride(tensor.stride(1)),
        column_stride(tensor.stride(2)),
        element_size(static_cast<std::int64_t>(tensor.element_size())) {}

  char* at(std::int64_t row, std::int64_t column) const {
    const std::int64_t offset =
        row / length * batch_stride + row % length * length_stride + column * column_stride;
    return data + offset * element_size;
  }
};

// The arguments that forward and backward share, and what follows from them.
struct Problem {
  Element element;
  ScalarType result;  // dtype of statistics, state, temperature and upstream gradients
  Matrix logits;
  std::int64_t rows, vocab;
  std::int64_t columns;  // those that are read
  std::int64_t parts;    // column parts per row
  bool split;            // whether threads share the parts of a row
  Labels labels;
  const void* temperature;
  std::int64_t temperature_stride;  // 0: one for all rows
  RowOptions options;
  const RowKernels& kernels;

  Problem(const Tensor& logits_, const Tensor& target, const Tensor& temperature_, const RowOptions& options_)
      : element(element_of(logits_)),
        result(result_of(logits_)),
        logits(logits_, const_cast<void*>(logits_.const_data_ptr())),
        rows(logits_.size(0) * logits_.size(1)),
        vocab(logits_.size(2)),
        columns(options_.columns(vocab)),
        parts(std::max<std::int64_t>(1, (columns + kPartColumns - 1) / kPartColumns)),
        split(rows < kFewRows && parts > 1),
        labels(labels_of(target)),
        temperature(temperature_.const_data_ptr()),
        temperature_stride(temperature_.numel() == 1 ? 0 : 1),
        options(options_),
        kernels(row_kernels(element, selected_capability())) {}

  bool ignores(std::int64_t row) const { return labels[row] == options.ignore_index; }
  // The target's column here, or -1 if it lies elsewhere.
  std::int64_t target_column(std::int64_t row) const { return options.label_column(labels[row], columns); }
  double temperature_of(std::int64_t row) const {
    const std::int64_t i = row * temperature_stride;
    return result == ScalarType::Double ? static_cast<const double*>(temperature)[i]
                                        : static_cast<const float*>(temperature)[i];
  }
  // Columns before part `part`, which may be the one behind the last.
  std::int64_t edge(std::int64_t part) const { return std::min(part * kPartColumns, columns); }
  Row part_of_row(std::int64_t row, std::int64_t begin, std::int64_t end) const {
    return {logits.at(row, begin), end - begin, logits.column_stride};
  }
  double capped(double logit) const {
    return options.softcap > 0 ? kernels.capped(logit, options.softcap) : logit;
  }

  // Calls run with the arithmetic that every row has.
  template <class Run>
  void with_flush(const Run& run) const {
    if (element == Element::kFloat64) {
      run();
    } else {
      const FlushSubnormals flush;
      run();
    }
  }
  // Calls run(row, first, last), the parts from `first` to before `last`, for all of them on torch's threads.
  template <class Run>
  void for_each_part(const Run& run) const {
    const std::int64_t shares = split ? parts : 1, each = parts / shares;
    parallel_tasks(rows * shares, columns / shares, [&](std::int64_t task) {
      const std::int64_t row = task / shares, first = task % shares * each;
      with_flush([&] { run(row, first, first + each); });
    });
  }
};

// The row's target, and the results that are not what the sums say.
template <typename T>
void finish(const Problem& problem, const RowOutputs<T>& outputs, std::int64_t row, SoftmaxState<double> state,
            bool second_order) {
  const double temperature = problem.temperature_of(row);
  const std::int64_t column = problem.target_column(row);
  if (column >= 0) state.x_y = problem.capped(load(problem.logits.at(row, column), problem.element));
  const bool valid = problem.options.is_valid(problem.labels[row]) && temperature > 0;
  outputs.write(row, state, valid ? finalize(state, temperature) : TokenStats<double>::all(kNaN<double>), second_order);
}

template <typename T>
void forward(const Problem& problem, const RowOutputs<T>& outputs) {
  const bool second_order = outputs.second_order();
  const auto accumulate = [&](std::int64_t row, std::int64_t part) {
    return problem.kernels.accumulate(problem.part_of_row(row, problem.edge(part), problem.edge(part + 1)),
                                      problem.temperature_of(row), problem.options.softcap, second_order);
  };
  const auto merged = [&](std::int64_t row, const auto& state_of) {
    SoftmaxState<double> state = state_of(row, 0);
    for (std::int64_t part = 1; part < problem.parts; ++part) {
      state = merge(state, state_of(row, part), problem.temperature_of(row));
    }
    finish(problem, outputs, row, state, second_order);
  };
  std::vector<SoftmaxState<double>> states(problem.split ? problem.rows * problem.parts : 0);
  problem.for_each_part([&](std::int64_t row, std::int64_t first, std::int64_t) {
    if (problem.ignores(row)) {
      if (first == 0) outputs.write(row, SoftmaxState<double>::ignored(), TokenStats<double>::all(0), second_order);
    } else if (problem.split) {
      states[row * problem.parts + first] = accumulate(row, first);
    } else {
      merged(row, accumulate);
    }
  });
  if (!problem.split) return;
  const auto accumulated = [&](std::int64_t row, std::int64_t part) { return states[row * problem.parts + part]; };
  problem.with_flush([&] {
    for (std::int64_t row = 0; row < problem.rows; ++row) {
      if (!problem.ignores(row)) merged(row, accumulated);
    }
  });
}

std::tuple<Tensor, Tensor> token_stats_forward(Tensor logits, Tensor target, Tensor temperature, double softcap,
                                               std::int64_t ignore_index, std::int64_t vocab_start,
                                               std::int64_t vocab_size, std::int64_t want) {
  const RowOptions options = {softcap, ignore_index, vocab_start, vocab_size};
  check_arguments(logits, target, temperature, options, want);
  const Problem problem(logits, target, temperature, options);
  Tensor stats = torch::stable::empty({statistics_in(want), problem.rows}, problem.result);
  Tensor state = torch::stable::empty({state_rows(want), problem.rows}, problem.result);
  const auto run = [&]<typename T>(T) { forward(problem, outputs_of<T>(stats, state, want)); };
  problem.result == ScalarType::Double ? run(double{}) : run(float{});
  return {stats, state};
}

// The target's own term makes g_logprob (1 - p_y), in double before the one rounding to the logits' dtype.
double target_gradient(const Problem& problem, const SoftmaxState<double>& state, double temperature,
                       const GradientCoefficients<double>& c, double grad_logprob, double logit) {
  const double x = (state.x_y - state.m) / temperature;
  const double e = std::exp(x);
  double dz = grad_logprob / temperature;
  // where e is 0, x may be -inf; a row with NaN or +inf has NaN throughout
  if (e != 0 || is_nan(state.s)) dz += e * (c.constant + c.linear * x + c.quadratic * e);
  return problem.options.softcap > 0 ? dz * capped_derivative(logit, problem.options.softcap) : dz;
}

void fill_zero(const Matrix& matrix, std::int64_t row, std::int64_t begin, std::int64_t end) {
  if (matrix.column_stride == 1) {
    if (begin < end) std::memset(matrix.at(row, begin), 0, (end - begin) * matrix.element_size);
    return;
  }
  for (std::int64_t j = begin; j < end; ++j) std::memset(matrix.at(row, j), 0, matrix.element_size);
}

// `streaming`: the gradient is fresh memory and too large to stay in the caches.
template <typename T>
void backward(const Problem& problem, const Upstream<T>& upstream, const StateInput<T>& states, const Matrix& gradient,
              bool streaming) {
  problem.for_each_part([&](std::int64_t row, std::int64_t first, std::int64_t last) {
    const std::int64_t begin = problem.edge(first), end = problem.edge(last);
    if (last == problem.parts) fill_zero(gradient, row, end, problem.vocab);
    const TokenStats<double> grads = upstream.template at<double>(row);
    // No gradient comes in: none goes out, and the row is not read, whatever it holds.
    if (problem.ignores(row) || grads.all_zero()) {
      fill_zero(gradient, row, begin, end);
      return;
    }
    const SoftmaxState<double> state = states.template at<double>(row, upstream.second_order());
    const double temperature = problem.temperature_of(row);
    const GradientCoefficients<double> coefficients = gradient_coefficients(state, temperature, grads);
    const std::int64_t column = problem.target_column(row);
    const bool has_target = column >= begin && column < end;
    // before the row may be overwritten
    const double logit = has_target ? load(problem.logits.at(row, column), problem.element) : 0;
    const RowGradient out = {gradient.at(row, begin), gradient.column_stride, streaming, state.m, temperature,
                             problem.options.softcap, coefficients};
    problem.kernels.gradient(problem.part_of_row(row, begin, end), out);
    if (has_target) {
      store(gradient.at(row, column), problem.element,
            target_gradient(problem, state, temperature, coefficients, grads[kLogprob], logit));
    }
  });
}

void token_stats_backward(Tensor grad_stats, Tensor logits, Tensor target, Tensor temperature, Tensor state,
                          double softcap, std::int64_t ignore_index, std::int64_t vocab_start, std::int64_t vocab_size,
                          std::int64_t want, Tensor dlogits) {
  const RowOptions options = {softcap, ignore_index, vocab_start, vocab_size};
  check_arguments(logits, target, temperature, options, want);
  check_backward(grad_stats, logits, target, temperature, state, want, dlogits);
  const Problem problem(logits, target, temperature, options);
  const Matrix gradient(dlogits, dlogits.mutable_data_ptr());
  const std::int64_t bytes = problem.rows * problem.vocab * gradient.element_size;
  const bool streaming = gradient.data != problem.logits.data && dlogits.is_contiguous() && bytes >= kLargeBytes;
  const auto run = [&]<typename T>(T) {
    backward(problem, upstream_of<T>(grad_stats, want), state_of<T>(state), gradient, streaming);
  };
  problem.result == ScalarType::Double ? run(double{}) : run(float{});
}

STABLE_TORCH_LIBRARY_IMPL(entropy_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("token_stats_forward", TORCH_BOX(&token_stats_forward));
  m.impl("token_stats_backward", TORCH_BOX(&token_stats_backward));
}

}  // namespace

const RowKernels& row_kernels(Element element, [[maybe_unused]] Capability capability) {
  if (element == Element::kFloat64) return float64::kernels();
#if defined(__x86_64__)
  if (capability == Capability::kAvx512) return avx512::kernels(element);
  if (capability == Capability::kAvx2) return avx2::kernels(element);
#endif
  return portable::kernels(element);
}

}  // namespace entropy_kernels::cpu
