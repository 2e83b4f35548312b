// Trained views of the next layers (predictor.h).
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"
#include "predictor.h"

namespace moeserve {

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
  bool is_brief(int place, const RoutedRows &rows) const;
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
