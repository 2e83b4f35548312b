// Gate predictors, one call per layer: which experts the next layers will want. What is computed
// and why stands in predictors/gate_lookahead.py and predictors/gate_residual.py, which do the same
// in numpy; constants come from there.
//
// A predictor has a view from every layer that looks ahead, by the layer's place among the MoE
// layers. Layers come in rising order; one that does not rise begins a step. A view's result stays
// where it was written until the layer's next call: [num_ahead, num_experts], the chance that any
// row wants the expert. Calls of one predictor come one at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"
#include "runtime.h"

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

// What turns margins of scores into chances, and how it learns.
struct CalibrationRule {
  float bins_per_unit;
  double half_life_tokens;
  double neighbour;     // share of each neighbouring bin in what a bin says
  double least_chance;  // and most, from 1
  int every_steps;      // of so many steps one is learnt from
};

// P(chosen | bin) of one layer as seen from another, from what was really chosen.
class BinChances {
 public:
  BinChances(const CalibrationRule &rule, std::vector<double> hits, std::vector<double> counts);

  // bins: [num_rows, num_experts]. ids: [num_rows, top_k] that those rows then chose.
  void add(const std::uint8_t *bins, std::int64_t num_rows, int num_experts,
           const std::int64_t *ids, int top_k);
  const std::vector<float> &table() const { return table_; }

 private:
  void refresh();

  CalibrationRule rule_;
  std::vector<double> hits_, counts_;
  std::vector<float> table_;
};

class LookaheadPredictor {
 public:
  // hits, counts: of every bin, what is believed at the start; at most 256 bins.
  LookaheadPredictor(int num_layers, int num_experts, int top_k, const CalibrationRule &rule,
                     std::vector<double> hits, std::vector<double> counts);

  // gates: [num_ahead * num_experts, H], of the layers after `place`.
  void set_view(int place, const Matrix &gates, int num_ahead, float *out);
  // False where nothing is said.
  bool predict(Runtime &runtime, int place, const RoutedRows &rows);

 private:
  struct View {
    Matrix gates = {};
    int num_ahead = 0;
    float *out = nullptr;
    std::vector<float> units;  // of the margins, by layer ahead, from the first scores seen
    std::vector<BinChances> chances;
    std::vector<std::uint8_t> bins;  // [num_ahead, num_rows, num_experts] of a step to learn from
    std::int64_t num_rows = 0;       // in bins; 0: nothing to learn
  };
  void learn(int place, const RoutedRows &rows);
  void find_units(View &view, const float *scores, std::int64_t num_rows) const;
  void bins_of(const View &view, const float *scores, std::int64_t num_rows, std::int64_t row,
               float *sorted, std::uint8_t *bins) const;

  const int num_experts_, top_k_;
  const CalibrationRule rule_;
  const BinChances at_start_;
  std::vector<View> views_;
  std::int64_t step_ = 0;
  int place_ = -1;
  Scratch scores_, sorted_, bins_;
};

// A trained view. Numbers of outputs, ranks and units are padded to multiples of 16 with zeros.
struct ResidualView {
  int num_ahead;  // 0: it only leaves behind what the layer before needs of the next row
  int outputs;    // num_ahead * num_experts, padded
  int rank;       // of the context
  int next_rank;  // of the context of the layer before, 0 where there is none
  int units;      // per expert
  // Of the state: outputs, context of this row, of the next row, next row's of the layer before.
  Matrix products;           // [outputs + 2 * rank + next_rank, H]
  Matrix expert_in;          // [num_experts * units, H], the same format
  const float *bias;         // [outputs + rank]
  const float *chosen;       // [num_experts, outputs + rank], what a chosen expert's weight adds
  const float *context_out;  // [rank, outputs]
  const float *expert_out;   // [num_experts, units, outputs]
  float *out;
};

class ResidualPredictor {
 public:
  ResidualPredictor(int num_layers, int num_experts);

  void set_view(int place, const ResidualView &view);
  // For every row of the step to come the row of the last one that held the token before, or -1.
  void begin_step(const std::int64_t *previous_rows, std::int64_t num_rows);
  // False where nothing is said.
  bool predict(Runtime &runtime, int place, const RoutedRows &rows);

 private:
  // What the rows of a step leave for the rows that follow them.
  struct Past {
    std::vector<float> own, next;  // [num_rows, rank], [num_rows, next_rank]
    std::int64_t step = -1, num_rows = 0;
  };
  struct Place {
    ResidualView view = {};
    bool is_set = false;
    Past past[2];  // of even and of odd steps
  };
  struct Work;

  void turn(std::int64_t num_rows);
  const float *last(int place, std::vector<float> Past::*part, int rank) const;
  Work begin(const Kernels &kernels, int place, const RoutedRows &rows);
  void keep(Place &place, const Work &work);

  const int num_experts_;
  std::vector<Place> places_;
  std::vector<std::int64_t> told_, before_;
  bool is_told_ = false;
  std::int64_t step_ = 0, num_rows_ = 0;
  int place_;
  RowBuffer prepared_;
  Scratch ones_, states_, products_, units_, weights_, scratch_;
};

}  // namespace moeserve
