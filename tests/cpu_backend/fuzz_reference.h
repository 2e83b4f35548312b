// What products and activations should give, in double, for the fuzz driver.
#pragma once

#include "fuzz_inputs.h"

namespace fuzz {

// A row as a level's kernels multiply it, and how far apart two neighbouring values are.
struct Used {
  std::vector<double> row;
  double step = 0.0;
};

inline Used as_used(const Kernels &kernels, const PackedLayout &layout,
                    const std::vector<double> &row) {
  Used used = {row, 0.0};
  float bound = 0.0f;
  for (const double x : row) bound = std::max(bound, static_cast<float>(std::fabs(x)));
  switch (kernels.row_form(layout)) {
    case RowForm::kF32:
      for (double &x : used.row) x = static_cast<float>(x);
      break;
    case RowForm::kBF16:
      for (double &x : used.row) x = from_bf16(to_bf16(static_cast<float>(x)));
      used.step = std::ldexp(bound, -8);
      break;
    case RowForm::kInt8: {
      // As in quantize_row: rows below 2^-120, such as hidden states that an activation has all but
      // switched off, have codes of zero. The inverse of their scale would be Inf, and 0 Inf NaN.
      const float inverse = bound >= 0x1p-120f ? 127.0f / bound : 0.0f, scale = bound / 127.0f;
      for (double &x : used.row) {
        x = std::nearbyint(static_cast<float>(x) * inverse) * static_cast<double>(scale);
      }
      used.step = scale;
      break;
    }
  }
  return used;
}

struct Sum {
  double value = 0.0;
  double magnitude = 0.0;
  double largest = 0.0;  // weight
};

inline Sum product(const std::vector<double> &weight, const std::vector<double> &row) {
  Sum sum;
  for (std::size_t k = 0; k < row.size(); ++k) {
    sum.value += weight[k] * row[k];
    sum.magnitude += std::fabs(weight[k] * row[k]);
    sum.largest = std::max(sum.largest, std::fabs(weight[k]));
  }
  return sum;
}

// Rounding to the type of results; a result beyond half precision is Inf and not compared.
inline double rounding(Dtype dtype, double x) {
  const double relative = dtype == Dtype::kF32 ? 0x1p-24 : dtype == Dtype::kBF16 ? 0x1p-8 : 0x1p-11;
  return std::fabs(x) * relative + 0x1p-24;
}

inline std::vector<double> row_of(const Numbers &x, int row) {
  std::vector<double> numbers;
  for (int c = 0; c < x.cols; ++c) numbers.push_back(x.get(row, c));
  return numbers;
}

inline double activation(const ActivationSpec &spec, double gate, double up) {
  const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  switch (spec.kind) {
    case Activation::kSilu:
      return gate * sigmoid(gate) * up;
    case Activation::kGelu:
      return 0.5 * gate * (1.0 + std::erf(gate / std::sqrt(2.0))) * up;
    case Activation::kGeluTanh:
      return 0.5 * gate *
             (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (gate + 0.044715 * gate * gate * gate))) * up;
    case Activation::kQuickGelu:
      return gate * sigmoid(1.702 * gate) * up;
    case Activation::kRelu:
      return std::max(gate, 0.0) * up;
    case Activation::kSwigluClamped: {
      const double limit = spec.limit;
      gate = std::min(gate, limit);
      return (std::clamp(up, -limit, limit) + 1.0) * gate * sigmoid(spec.alpha * gate);
    }
  }
  return NAN;
}

}  // namespace fuzz
