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

// Experts, and which of them each row takes. All ids must be within the experts.
struct ExpertChoice {
  const Experts *experts;
  const std::int64_t *ids;  // [num_tokens, top_k]
  const float *weights;     // [num_tokens, top_k]; null: all are 1
  int top_k;
  const std::uint8_t *wanted;  // [num_experts], 0 for those to leave out; null: all are wanted
};

// Experts of one kind are a list: they have one format and one width. A shared expert is a list of
// its own, of one expert that every row takes.
struct ExpertJob {
  Dtype dtype;  // of x and y
  const void *x;
  std::int64_t num_tokens;
  std::int64_t x_stride;  // in numbers
  ExpertChoice lists[kMaxExpertLists];
  int num_lists;
  Dtype y_dtype;
  void *y;       // [num_tokens, H]
  float *apart;  // [num_tokens * top_k, H], see below; null: y is wanted
  // With `apart`: where x is kept as the first list multiplies it, for the job's next parts. They
  // say so by `is_prepared`.
  RowBuffer *input;
  bool is_prepared;
};

// y[t] = sum over the wanted experts e of token t of weight * expert_e(x[t]), added up in the order
// of their numbers and rounded to y_dtype; then the same of the next list is added, in y_dtype. So
// the bits are those of one call for each list.
// With `apart`, for one list: apart[t * top_k + k] = expert_e(x[t]) of every wanted choice instead,
// without weights, and what was not wanted stays as it was.
void run_experts(Runtime &runtime, const ExpertJob &job);

}  // namespace moeserve
