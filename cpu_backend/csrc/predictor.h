// Gate predictors, one call per layer: which experts the next layers will want. What is computed
// and why stands in predictors/gate_lookahead.py and predictors/gate_residual.py, which do the same
// in numpy; constants come from there.
//
// A predictor has a view from every layer that looks ahead, by the layer's place among the MoE
// layers. Layers come in rising order; one that does not rise begins a step. A view's result stays
// where it was written until the layer's next call: [num_ahead, num_experts], the chance that any
// row wants the expert. Calls of one predictor come one at a time.
//
// A call that is brief computes on the calling thread alone, a few microseconds. Whoever holds
// Python's lock should keep it meanwhile: to get it back from a thread that reads records takes
// longer, and the step waits.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace moeserve {

// A layer's input and what its router chose. Expert ids must be within the layer's.
struct RoutedRows {
  Dtype dtype;
  const void *x;  // [num_rows, H], rows x_stride numbers apart
  std::int64_t num_rows;
  std::int64_t x_stride;
  const std::int64_t *ids;  // [num_rows, top_k]
  const float *weights;     // [num_rows, top_k]
  int top_k;
};

inline std::size_t count_of(std::int64_t rows, std::int64_t cols) {
  return static_cast<std::size_t>(rows * cols);
}

// out [num_experts]: that any row wants the expert. chances: rows `stride` numbers apart.
void any_row(const float *chances, std::int64_t num_rows, std::int64_t stride, int num_experts,
             float *out);

}  // namespace moeserve
