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

// x[i] <- x[i] * cosine[i] + x[(i + dim / 2) % dim] * sine[i], for the first `dim` numbers of a
// head; the first half of the sines is negated (rotary embedding in halves, arXiv:2104.09864).
struct RowTurns {
  const float *cosine;  // [T, dim]
  const float *sine;
  int dim;
};

// Grouped heads after their projection: per kv head its queries, its key, its value. Queries and
// keys are normed, all are clipped, queries and keys are turned; key and value go to
// entries[slots[row]].
struct GroupedHeads {
  Dtype dtype;
  void *rows;  // [T, kv_heads, group_heads + 2, head_dim], rows row_stride numbers apart
  std::int64_t row_stride;
  int num_kv_heads;
  int group_heads;
  int head_dim;
  RowTurns turns;
  const float *norm_weight;  // [kv_heads, group_heads + 1, head_dim], or null: no norm
  std::int64_t norm_stride;  // of a kv head; 0: all have the same weights
  bool norm_together;        // one mean over all queries, one over all keys; else one for each head
  float norm_eps;
  float clip;  // bound on absolute values, perhaps infinite
  void *entries;
  const std::int64_t *slots;  // [T]
};

// Latent attention: the latent of a row is normed, its rotated part and that of its queries turned;
// latent and rotated part go to entries[slots[row]].
struct LatentHeads {
  Dtype dtype;
  const void *latents;  // [T, rank + turns.dim], rows latent_stride numbers apart
  std::int64_t latent_stride;
  int rank;
  void *rotated;  // [T, heads, turns.dim], of the queries
  std::int64_t rotated_strides[2];
  int num_heads;
  RowTurns turns;
  const float *norm_weight;  // [rank]
  float norm_eps;
  void *entries;
  const std::int64_t *slots;
};

struct AttentionKernels {
  // Memory that `attend` and `combine` want for tiles of that many pairs, of all kv heads together.
  std::size_t (*scratch_floats)(const AttentionCall &call, int num_pairs);
  std::size_t (*partial_floats)(const AttentionCall &call, int num_pairs);
  void (*attend)(const AttentionCall &call, const AttentionTile &tile, float *scratch);
  // Folds the partials of all partitions of a tile, in order, and writes the result.
  void (*combine)(const AttentionCall &call, const AttentionTile &tile, float *scratch);
  // One row. memory: 4 numbers for each of a head or latent and 64 more, 64-byte aligned.
  void (*prepare_grouped)(const GroupedHeads &call, std::int64_t row, float *memory);
  void (*prepare_latent)(const LatentHeads &call, std::int64_t row, float *memory);
};

// Rows 0..num_rows-1 before their attention.
void prepare(Runtime &runtime, const GroupedHeads &call, std::int64_t num_rows);
void prepare(Runtime &runtime, const LatentHeads &call, std::int64_t num_rows);

// Computes all rows of the spans. What the arguments say about memory must be true.
void attend(Runtime &runtime, const AttentionCall &call, const std::vector<AttentionSpan> &spans);

}  // namespace moeserve
