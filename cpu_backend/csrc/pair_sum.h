// The weighted sum of a layer's experts from the outputs of its (token, choice) pairs.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "runtime.h"

namespace moeserve {

struct PairSum {
  const float *pairs;  // [num_tokens, top_k, H]
  const std::int64_t *ids;
  const float *weights;
  std::int64_t num_tokens;
  int top_k;
  std::int64_t hidden;
  Dtype y_dtype;
  void *y;  // [num_tokens, H]
};

// y[t] = sum of weight * pair, added up in the order of the experts' numbers: the bits that
// run_experts gives, whichever calls computed the pairs, and in whatever order.
void sum_pairs(Runtime &runtime, const PairSum &sum);

}  // namespace moeserve
