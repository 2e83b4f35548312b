// Causal softmax attention over the paged kv, and what stands before it: norm and rotation of
// heads.
//
// A query row's result is the same bits whatever rows it is computed with and on however many
// threads, because its arithmetic follows from positions alone: keys are taken in blocks that start
// at multiples of kBlockKeys; the blocks of a partition of kPartitionKeys share one running
// softmax; the partitions of a row are combined from first to last. A tile may hold any rows, and a
// long context may be spread over threads by partitions: that moves work, never an addition.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moeserve {

enum class Dtype : int;  // kernels.h, which holds a table of the functions below
struct Runtime;

constexpr int kBlockKeys = 64;
constexpr int kPartitionKeys = 256;
constexpr int kMaxTilePairs = 96;

// What all rows of one call share. A kv row is a key in its first key_dim numbers and a value in
// value_dim numbers from value_start on; both may overlap. Strides are in numbers.
struct AttentionCall {
  Dtype dtype;
  int num_kv_heads;
  int group_heads;  // query heads of a kv head
  int key_dim;
  int value_start;
  int value_dim;
  int width;            // of a kv row
  std::int64_t window;  // keys that a query sees, itself included; 0: all before it
  float scale;
  const void *queries;  // [T, kv_heads, group_heads, key_dim]
  std::int64_t query_strides[3];
  const void *entries;  // [slots, kv_heads, width], contiguous
  const float *sinks;   // [kv_heads, group_heads] or null: logits whose value is zero
  void *out;            // [T, kv_heads, group_heads, value_dim], contiguous
};

// Rows of one sequence, the last of its context.
struct AttentionSpan {
  std::int64_t first_row;
  std::int64_t num_rows;
  std::int64_t context_tokens;
  const std::int64_t *kv_slots;  // [context_tokens]
};

// Pairs (row, head of the group), numbered row * group_heads + head, with some kv heads and with
// the partitions first_partition..end_partition-1 of their context.
struct AttentionTile {
  const AttentionSpan *span;
  int first_head;
  int num_heads;
  std::int64_t first_pair;
  int num_pairs;  // of each kv head; of all together at most kMaxTilePairs
  std::int64_t first_partition;
  std::int64_t end_partition;
  // Null: these are all partitions, and `attend` writes the result. Otherwise it leaves one block
  // of partial_floats() per partition here, for `combine`.
  float *partials;
};

// Turns of rows, cos and signed sin: x[i] <- x[i] * cos[i] + x[(i + dim/2) % dim] * sin[i].
struct HeadTurns {
  const float *cosine;  // [T, dim]
  const float *sine;
  int dim;
};

// Heads of one row that are normed together: out = x * rsqrt(mean(x^2) + eps) * weight.
struct HeadNorm {
  const float *weight;         // of the first head
  std::int64_t weight_stride;  // 0: all heads have the same
  float eps;
  bool together;  // one mean over all heads
};

// Heads of one row, `dim` numbers each, `stride` apart.
struct HeadRow {
  Dtype dtype;
  void *data;
  int num_heads;
  std::int64_t stride;
  int dim;
};

struct AttentionKernels {
  // Memory that `attend` and `combine` want for tiles of that many pairs, of all kv heads together.
  std::size_t (*scratch_floats)(const AttentionCall &call, int num_pairs);
  std::size_t (*partial_floats)(const AttentionCall &call, int num_pairs);
  void (*attend)(const AttentionCall &call, const AttentionTile &tile, float *scratch);
  // Folds the partials of all partitions of a tile, in order, and writes the result.
  void (*combine)(const AttentionCall &call, const AttentionTile &tile, float *scratch);
  // In place. scratch: as many floats as the row has numbers, each head padded to a multiple of 16.
  void (*rotate)(const HeadRow &row, const float *cosine, const float *sine);
  void (*norm)(const HeadRow &row, const HeadNorm &norm);
};

// Computes all rows of the spans. What the arguments say about memory must be true.
void attend(Runtime &runtime, const AttentionCall &call, const std::vector<AttentionSpan> &spans);

}  // namespace moeserve
