// The two halves of a decoder layer, each in one call: x += attention(norm(x)), and
// x += ffn(norm(x)). Between their parts stand the same roundings as between calls of the
// parts, so that the result has the same bits.
#pragma once

#include "attention.h"
#include "moe.h"
#include "router.h"

namespace moeserve {

struct Norm {
  const float *weight;  // [H]
  float eps;
};

// The residual stream of a step, changed in place: [num_rows, hidden], contiguous.
struct Stream {
  Dtype dtype;
  void *x;
  std::int64_t num_rows;
  int hidden;
};

// out = norm of the rows of x; strides in bytes.
void rms_norm(Runtime &runtime, Dtype dtype, const Norm &norm, const void *x, std::int64_t x_bytes,
              void *out, std::int64_t out_bytes, std::int64_t num_rows, int cols);

// logits [num_rows, outputs] float32, of the norm of the rows of x, `x_bytes` apart.
void run_head(Runtime &runtime, const Norm &norm, const Matrix &head, Dtype dtype, const void *x,
              std::int64_t x_bytes, std::int64_t num_rows, float *logits);

struct AttentionHalf {
  Norm norm;
  const Matrix *qkv;
  const Matrix *output;
};

// heads, call: complete but for what stands in the workspace (rows, queries, out).
void run_attention(Runtime &runtime, const AttentionHalf &half, const Stream &stream,
                   GroupedHeads heads, AttentionCall call, const std::vector<AttentionSpan> &spans);

// Experts of one list, and the gate that chooses among them; without one every row takes the first
// expert as it is: a shared expert, or a dense FFN.
struct FfnPart {
  const Experts *experts;
  const Matrix *gate;  // or null
  RouterRule rule;
};

struct FfnHalf {
  Norm norm;
  FfnPart parts[kMaxExpertLists];
  int num_parts;
};

// uses: [num_experts] of the first part, overwritten by how many rows chose each; null where nobody
// counts.
void run_ffn(Runtime &runtime, const FfnHalf &half, const Stream &stream, std::int32_t *uses);

}  // namespace moeserve
