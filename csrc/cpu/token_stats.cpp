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
#include <optional>
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

// A one-dimensional fp32 or fp64 tensor of any stride, or nothing, which reads as 0.
struct Vector {
  const void* data = nullptr;
  std::int64_t stride = 0;
  bool wide = false;

  double operator[](std::int64_t i) const {
    if (data == nullptr) return 0;
    return wide ? static_cast<const double*>(data)[i * stride] : static_cast<const float*>(data)[i * stride];
  }
};

// The arguments that forward and backward share, checked, and what follows from them.
struct Problem {
  Element element;
  ScalarType result;  // dtype of statistics, state, temperature and upstream gradients
  Matrix logits;
  std::int64_t rows, vocab;
  std::int64_t columns;  // those with a global id below vocab_size; the rest count as -inf and are not read
  std::int64_t parts;    // column parts per row
  bool split;            // whether threads share the parts of a row
  const void* target;
  bool wide_target;
  Vector temperature;
  double softcap;
  std::int64_t ignore_index, vocab_start, vocab_size;
  const RowKernels& kernels;

  // Before anything is asked of them.
  static const Tensor& checked(const Tensor& logits, const Tensor& target, const Tensor& temperature, double softcap,
                               std::int64_t vocab_start, std::int64_t vocab_size) {
    check_arguments(logits, target, temperature, softcap, vocab_start, vocab_size);
    return logits;
  }

  Problem(const Tensor& logits_, const Tensor& target_, const Tensor& temperature_, double softcap_,
          std::int64_t ignore_index_, std::int64_t vocab_start_, std::int64_t vocab_size_)
      : element(element_of(checked(logits_, target_, temperature_, softcap_, vocab_start_, vocab_size_))),
        result(result_of(logits_)),
        logits(logits_, const_cast<void*>(logits_.const_data_ptr())),
        rows(logits_.size(0) * logits_.size(1)),
        vocab(logits_.size(2)),
        columns(std::clamp<std::int64_t>(vocab_size_ - vocab_start_, 0, vocab)),
        parts(std::max<std::int64_t>(1, (columns + kPartColumns - 1) / kPartColumns)),
        split(rows < kFewRows && parts > 1),
        target(target_.const_data_ptr()),
        wide_target(target_.scalar_type() == ScalarType::Long),
        softcap(softcap_),
        ignore_index(ignore_index_),
        vocab_start(vocab_start_),
        vocab_size(vocab_size_),
        kernels(row_kernels(element, selected_capability())) {
    temperature = {temperature_.const_data_ptr(), temperature_.numel() == 1 ? 0 : 1, element == Element::kFloat64};
  }

  std::int64_t label(std::int64_t row) const {
    return wide_target ? static_cast<const std::int64_t*>(target)[row] : static_cast<const std::int32_t*>(target)[row];
  }
  // The label's column here, or -1 if it lies elsewhere.
  std::int64_t label_column(std::int64_t label) const {
    // compared first: far labels must not overflow the difference
    return label != ignore_index && label >= vocab_start && label - vocab_start < columns ? label - vocab_start : -1;
  }
  // Columns before part `part`, which may be the one behind the last.
  std::int64_t edge(std::int64_t part) const { return std::min(part * kPartColumns, columns); }
  Row part_of_row(std::int64_t row, std::int64_t begin, std::int64_t end) const {
    return {logits.at(row, begin), end - begin, logits.column_stride};
  }
  double capped(double logit) const { return softcap > 0 ? kernels.capped(logit, softcap) : logit; }

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

template <typename T>
struct ForwardOutputs {
  T *logprob, *entropy, *collision, *vocab_covariance;  // null where not wanted
  T* state;                                             // (K, N)
  std::int64_t rows;
  bool second_moments;

  void write(std::int64_t row, const SoftmaxState<double>& state, const TokenStats<double>& stats) const {
    const double fields[] = {state.m, state.s, state.w, state.x_y, state.s2, state.w2};
    for (int k = 0; k < (second_moments ? 6 : 4); ++k) this->state[k * rows + row] = static_cast<T>(fields[k]);
    if (logprob != nullptr) logprob[row] = static_cast<T>(stats.logprob);
    if (entropy != nullptr) entropy[row] = static_cast<T>(stats.entropy);
    if (collision != nullptr) collision[row] = static_cast<T>(stats.collision);
    if (vocab_covariance != nullptr) vocab_covariance[row] = static_cast<T>(stats.vocab_covariance);
  }

  // The row's target, and the results that are not what the sums say.
  void finish(const Problem& problem, std::int64_t row, SoftmaxState<double> state) const {
    const std::int64_t label = problem.label(row);
    const double temperature = problem.temperature[row];
    const std::int64_t column = problem.label_column(label);
    if (column >= 0) state.x_y = problem.capped(load(problem.logits.at(row, column), problem.element));
    if (label >= 0 && label < problem.vocab_size && temperature > 0) {
      write(row, state, finalize(state, temperature));
    } else {
      const double nan = std::numeric_limits<double>::quiet_NaN();
      write(row, state, {nan, nan, nan, nan});
    }
  }
};

template <typename T>
void forward(const Problem& problem, const ForwardOutputs<T>& outputs) {
  const auto accumulate = [&](std::int64_t row, std::int64_t part) {
    return problem.kernels.accumulate(problem.part_of_row(row, problem.edge(part), problem.edge(part + 1)),
                                      problem.temperature[row], problem.softcap, outputs.second_moments);
  };
  const auto finish = [&](std::int64_t row, const auto& state_of) {
    SoftmaxState<double> state = state_of(row, 0);
    for (std::int64_t part = 1; part < problem.parts; ++part) {
      state = merge(state, state_of(row, part), problem.temperature[row]);
    }
    outputs.finish(problem, row, state);
  };
  std::vector<SoftmaxState<double>> states(problem.split ? problem.rows * problem.parts : 0);
  problem.for_each_part([&](std::int64_t row, std::int64_t first, std::int64_t) {
    if (problem.label(row) == problem.ignore_index) {
      if (first == 0) outputs.write(row, {0, 1, 0, 0, 1, 0}, {0, 0, 0, 0});
    } else if (problem.split) {
      states[row * problem.parts + first] = accumulate(row, first);
    } else {
      finish(row, accumulate);
    }
  });
  if (!problem.split) return;
  const auto accumulated = [&](std::int64_t row, std::int64_t part) { return states[row * problem.parts + part]; };
  problem.with_flush([&] {
    for (std::int64_t row = 0; row < problem.rows; ++row) {
      if (problem.label(row) != problem.ignore_index) finish(row, accumulated);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_stats_forward(
    Tensor logits, Tensor target, Tensor temperature, double softcap, std::int64_t ignore_index,
    std::int64_t vocab_start, std::int64_t vocab_size, std::int64_t want) {
  const Problem problem(logits, target, temperature, softcap, ignore_index, vocab_start, vocab_size);
  check_want(want);
  const bool second_moments = (want & (kCollision | kVocabCovariance)) != 0;
  const auto output = [&](Want bit) {
    return torch::stable::empty({want & bit ? problem.rows : 0}, problem.result);
  };
  Tensor logprob = output(kLogprob), entropy = output(kEntropy);
  Tensor collision = output(kCollision), covariance = output(kVocabCovariance);
  Tensor state = torch::stable::empty({second_moments ? 6 : 4, problem.rows}, problem.result);
  const auto run = [&]<typename T>(T) {
    const auto pointer = [&](const Tensor& tensor, Want bit) {
      return want & bit ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
    };
    const ForwardOutputs<T> outputs = {pointer(logprob, kLogprob),
                                       pointer(entropy, kEntropy),
                                       pointer(collision, kCollision),
                                       pointer(covariance, kVocabCovariance),
                                       static_cast<T*>(state.mutable_data_ptr()),
                                       problem.rows,
                                       second_moments};
    forward(problem, outputs);
  };
  problem.result == ScalarType::Double ? run(double{}) : run(float{});
  return {logprob, entropy, collision, covariance, state};
}

// The target's own term makes g_logprob (1 - p_y), in double before the one rounding to the logits' dtype.
double target_gradient(const Problem& problem, const SoftmaxState<double>& state, double temperature,
                       const GradientCoefficients<double>& c, double grad_logprob, double logit) {
  const double x = (state.x_y - state.m) / temperature;
  const double e = std::exp(x);
  double dz = grad_logprob / temperature;
  // where e is 0, x may be -inf; a row with NaN or +inf has NaN throughout
  if (e != 0 || is_nan(state.s)) dz += e * (c.constant + c.linear * x + c.quadratic * e);
  return problem.softcap > 0 ? dz * capped_derivative(logit, problem.softcap) : dz;
}

void fill_zero(const Matrix& matrix, std::int64_t row, std::int64_t begin, std::int64_t end) {
  if (matrix.column_stride == 1) {
    if (begin < end) std::memset(matrix.at(row, begin), 0, (end - begin) * matrix.element_size);
    return;
  }
  for (std::int64_t j = begin; j < end; ++j) std::memset(matrix.at(row, j), 0, matrix.element_size);
}

void token_stats_backward(std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_entropy,
                          std::optional<Tensor> grad_collision, Tensor logits, Tensor target, Tensor temperature,
                          Tensor state, double softcap, std::int64_t ignore_index, std::int64_t vocab_start,
                          std::int64_t vocab_size, Tensor dlogits) {
  const Problem problem(logits, target, temperature, softcap, ignore_index, vocab_start, vocab_size);
  const bool wide = problem.element == Element::kFloat64;
  check_backward(grad_logprob, grad_entropy, grad_collision, logits, target, temperature, state, dlogits);
  const auto upstream = [&](const std::optional<Tensor>& grad) -> Vector {
    return grad.has_value() ? Vector{grad->const_data_ptr(), grad->stride(0), wide} : Vector{};
  };
  const Vector g_logprob = upstream(grad_logprob);
  const Vector g_entropy = upstream(grad_entropy);
  const Vector g_collision = upstream(grad_collision);

  const Matrix gradient(dlogits, dlogits.mutable_data_ptr());
  const std::int64_t bytes = problem.rows * problem.vocab * gradient.element_size;
  const bool streaming = gradient.data != problem.logits.data && dlogits.is_contiguous() && bytes >= kLargeBytes;
  const std::int64_t field_stride = state.stride(0);
  const Vector fields = {state.const_data_ptr(), state.stride(1), wide};
  const auto field = [&](int k, std::int64_t row) {
    return Vector{static_cast<const char*>(fields.data) + k * field_stride * (wide ? 8 : 4), fields.stride, wide}[row];
  };

  problem.for_each_part([&](std::int64_t row, std::int64_t first, std::int64_t last) {
    const std::int64_t begin = problem.edge(first), end = problem.edge(last);
    if (last == problem.parts) fill_zero(gradient, row, end, problem.vocab);
    const std::int64_t label = problem.label(row);
    const double lp = g_logprob[row], h = g_entropy[row], c = g_collision[row];
    // No gradient comes in: none goes out, and the row is not read, whatever it holds.
    if (label == ignore_index || (lp == 0 && h == 0 && c == 0)) {
      fill_zero(gradient, row, begin, end);
      return;
    }
    SoftmaxState<double> s = {field(0, row), field(1, row), field(2, row), field(3, row), 0, 0};
    if (g_collision.data != nullptr) {
      s.s2 = field(4, row);
      s.w2 = field(5, row);
    }
    const double t = problem.temperature[row];
    const GradientCoefficients<double> coefficients = gradient_coefficients(s, t, lp, h, c);
    const std::int64_t column = problem.label_column(label);
    const bool has_target = column >= begin && column < end;
    // before the row may be overwritten
    const double logit = has_target ? load(problem.logits.at(row, column), problem.element) : 0;
    const RowGradient out = {gradient.at(row, begin), gradient.column_stride, streaming, s.m, t, softcap, coefficients};
    problem.kernels.gradient(problem.part_of_row(row, begin, end), out);
    if (has_target) {
      store(gradient.at(row, column), problem.element, target_gradient(problem, s, t, coefficients, lp, logit));
    }
  });
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
