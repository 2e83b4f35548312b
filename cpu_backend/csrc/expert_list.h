// The products of one list of experts within a call, item by item, as threads take them.
#pragma once

#include <cstdint>
#include <vector>

#include "moe.h"

namespace moeserve {

// One choice of a token. Sorted by expert; `row` of the hidden state is its place in that order.
struct Pair {
  std::int64_t expert;
  std::int64_t token;
  std::int64_t choice;  // token * top_k + its place among the token's
  float weight;
};

// Pairs of one expert: all of them, or an equal part where they are very many.
struct Group {
  std::int64_t expert;
  std::int64_t first;  // pair
  std::int64_t count;
};

// Where one thread computes: results of a product, sums of every token (of one choice where they go
// apart), activations of an expert.
struct ThreadNumbers {
  float *out, *sums, *rows;
};

// What a thread will read next.
struct ReadNext {
  const std::uint8_t *panels = nullptr;
  std::size_t panel_bytes = 0;
  const std::uint8_t *rows = nullptr;
  std::size_t rows_bytes = 0;
};

class ExpertList {
 public:
  // input: for rows of x, unless `other`, a list that prepares them, has them in the same form; it
  // may be null. memory: for rows between the list's products. Both its own within the call.
  ExpertList(Runtime &runtime, const ExpertJob &job, const ExpertChoice &choice, RowBuffer &input,
             ExpertMemory &memory, const ExpertList *other);

  bool has_many_rows() const { return many_; }  // for each expert
  std::int64_t read_bytes() const;              // of weights, once for every row

  void prepare(Dtype dtype, const void *x, std::int64_t token) const {
    if (prepares_ && is_used(token)) kernels_.prepare_row(in_format_, dtype, x, input_, token);
  }

  // Numbers of a thread's `out` and `rows`.
  std::size_t out_numbers(std::int64_t down_panels) const;
  std::size_t row_numbers() const;

  std::int64_t num_gate_up_items() const;
  void gate_up(const ThreadNumbers &numbers, std::int64_t item, const ReadNext &next) const;
  ReadNext gate_up_reads(std::int64_t item) const;

  // Pairs whose activations are rounded in a step between the products.
  std::int64_t num_hidden_items() const;
  void round_hidden(std::int64_t pair) const;

  // Sums of `num_panels` panels of outputs, from `panel` on: numbers.sums [num_tokens, width]; or
  // these outputs of every choice, where the job has them apart.
  void down(const ThreadNumbers &numbers, std::int64_t panel, std::int64_t num_panels,
            const ReadNext &next) const;
  ReadNext down_reads(std::int64_t panel) const { return down_reads(panel, 0); }

 private:
  void sort_choices(const ExpertChoice &choice);
  bool is_used(std::int64_t token) const {
    return used_.empty() || used_[static_cast<std::size_t>(token)] != 0;
  }
  // Panels `item` of the experts' gate and up. rows: where the activations of its expert go.
  void gate_up_panels(float *out, float *rows, std::int64_t item, const ReadNext &next) const;
  // result, bias: of the panels from `panel` on.
  void put_apart(const Pair &pair, const float *result, const float *bias, std::int64_t panel,
                 std::int64_t num_panels) const;
  void whole_expert(const ThreadNumbers &numbers, std::int64_t index, const ReadNext &next) const;
  ReadNext panels_of(std::int64_t item) const;
  ReadNext down_reads(std::int64_t panel, std::size_t group) const;
  const std::uint8_t *record(const Group &group) const {
    return experts_.records[static_cast<std::size_t>(group.expert)];
  }
  // Biases from a panel of outputs on; null where the experts have none.
  const float *bias_of(const Group &group, std::size_t offset, std::int64_t panel) const {
    if (offset == 0) return nullptr;
    return reinterpret_cast<const float *>(record(group) + offset) + panel * kPanelOutputs;
  }
  const Group &group_of(std::int64_t item) const {
    return groups_[static_cast<std::size_t>(item / gate_up_items_)];
  }

  const Kernels &kernels_;
  const Experts &experts_;
  const std::int64_t num_tokens_;
  float *const apart_;
  std::vector<std::uint8_t> used_;  // by token; empty: all are
  std::vector<Pair> pairs_;
  std::vector<std::int32_t> tokens_;  // of the pairs
  std::vector<Group> groups_;
  std::int64_t most_rows_ = 1;

  const RowFormat in_format_, hidden_format_;
  const bool prepares_;
  const Rows input_;
  Rows hidden_ = {};
  // Activations go straight into the rows of the second product where those are floats.
  const bool direct_;
  bool many_, whole_;
  std::size_t inner_, activated_stride_;
  float *activated_ = nullptr;  // [pairs, activated_stride]
  std::int64_t gate_up_panels_, gate_up_items_;
};

}  // namespace moeserve
