// The experts of one MoE layer: gate and up, activation, down, weighted sum, in one call.
#pragma once

#include <cstdint>
#include <vector>

#include "packed.h"
#include "runtime.h"

namespace moeserve {

// An expert is one contiguous record: packed gate_up, packed down, then its biases as floats.
// gate_up has the panels of gate and of up in turn, 16 outputs each; layouts are those of one
// expert. Where a bias is absent its offset is 0.
struct Experts {
  PackedLayout gate_up;  // [2 * padded I, H]
  PackedLayout down;     // [H, I]
  std::size_t down_offset;
  std::size_t gate_up_bias_offset;  // [gate_up.num_panels * 16]
  std::size_t down_bias_offset;     // [down.num_panels * 16]
  ActivationSpec activation;
  std::vector<const std::uint8_t *> records;  // of every expert
};

struct ExpertJob {
  Dtype dtype;  // of x and y
  const void *x;
  std::int64_t num_tokens;
  std::int64_t x_stride;    // in numbers
  const std::int64_t *ids;  // [num_tokens, top_k]
  const float *weights;     // [num_tokens, top_k]
  int top_k;
  const std::uint8_t *wanted;  // [num_experts], 0 for those to leave out; null: all are wanted
  Dtype y_dtype;
  void *y;  // [num_tokens, H]
};

// y[t] = sum over the wanted experts e of token t of weight * expert_e(x[t]), added up in the order
// of their numbers. All ids must be within the experts.
void run_experts(Runtime &runtime, const Experts &experts, const ExpertJob &job);

}  // namespace moeserve
