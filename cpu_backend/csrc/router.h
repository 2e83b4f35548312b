// The gate of a MoE layer: rows of x to the experts that they take and their weights.
#pragma once

#include <cstdint>

#include "linear.h"
#include "runtime.h"

namespace moeserve {

// Values are those that Python passes.
enum class RouterScore : int { kSoftmax = 0, kSigmoid = 1, kSoftmaxOfTop = 2 };

// experts/router.py says what they mean and which model has which.
struct RouterRule {
  int num_experts;
  int top_k;
  RouterScore score;
  bool float32_logits;  // else they are rounded to the dtype of x
  bool normalize;
  float normalize_eps;
  float scale;
  int num_groups;
  int top_groups;
  bool group_top2;          // a group is worth the sum of its two best, else its best
  const float *correction;  // [num_experts], added for choosing only; or null
  bool round_weights;       // to the dtype of x
};

// x: [num_rows, H]; ids, weights: [num_rows, top_k]. Equal scores fall as in torch.topk, which has
// no rule for them but an algorithm. A row's result depends on that row alone.
void route(Runtime &runtime, const Matrix &gate, const RouterRule &rule, Dtype dtype, const void *x,
           std::int64_t num_rows, std::int64_t x_stride, std::int64_t *ids, float *weights);

}  // namespace moeserve
