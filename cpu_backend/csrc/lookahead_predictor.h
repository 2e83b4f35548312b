// The gates of the next layers on the state of this one (predictor.h).
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"
#include "predictor.h"

namespace moeserve {

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
  bool is_brief(int place, std::int64_t num_rows) const;
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

}  // namespace moeserve
