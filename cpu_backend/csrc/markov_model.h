// Experts follow experts: what the layers around a layer have chosen says what the next ones will
// want. The model, how it learns and why stand in predictors/markov.py and
// predictors/log_linear.py, which do the same in numpy; constants come from there.
//
// Calls come one at a time. Those that are brief compute on the calling thread alone (predictor.h).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

#include "kernels.h"
#include "linear.h"

namespace moeserve {

struct MarkovShape {
  std::vector<int> sizes;  // experts of every layer, by place
  int depth;               // layers that a layer speaks of, at most all of them
  int num_context;         // layers that it looks at, from the furthest ahead of it backwards
};

struct MarkovRule {
  std::vector<float> steps;  // how far weights move, by uses of their feature; the last for more
  float bias_step;
  float most_logit;
};

class MarkovModel {
 public:
  MarkovModel(MarkovShape shape, MarkovRule rule);
  MarkovModel(const MarkovModel &) = delete;
  MarkovModel &operator=(const MarkovModel &) = delete;

  int num_layers() const { return static_cast<int>(shape_.sizes.size()); }
  int size_of(int place) const { return shape_.sizes[static_cast<std::size_t>(place)]; }
  int num_outcomes(int place) const { return places_[static_cast<std::size_t>(place)].outcomes; }
  std::int64_t num_rows() const { return num_rows_; }
  int top_k() const { return top_k_; }
  // Where `say` writes, before it is called: [num_outcomes], experts of the layers ahead one after
  // the other.
  void set_out(int place, float *out) { places_[static_cast<std::size_t>(place)].out = out; }
  bool has_out(int place) const { return places_[static_cast<std::size_t>(place)].out != nullptr; }

  // A step of that many rows begins. Row rows[i] of it goes on from row before[i] of the last one.
  void turn(const std::int64_t *rows, const std::int64_t *before, std::int64_t num_linked,
            std::int64_t num_rows, int top_k);
  // Layers were not seen: nothing is to be learnt from what was said so far.
  void forget();
  // The rows chose ids [num_rows, top_k] in that layer. True: `learn` has one thing more to do.
  bool see(int place, const std::int64_t *ids);
  // The oldest thing that there is to learn; one for each `see` that was true.
  void learn(Runtime &runtime);
  // The chance of every outcome that any row wants it, into the place's out.
  void say(Runtime &runtime, int place);
  // What a row of either reads, and how many rows `learn` has to look at.
  std::size_t row_bytes() const;
  std::int64_t rows_to_learn() const { return to_learn_.empty() ? 0 : to_learn_.front().num_rows; }

 private:
  // What a layer has said of the next ones, and from what.
  struct Said {
    int place = -1;
    std::int64_t num_rows = 0;           // 0: nothing
    std::vector<std::int32_t> features;  // [num_rows, num_context * top_k], -1: unknown
    std::vector<float> chances;          // [num_rows, outcomes]; then what was wrong with them
    bool is_turned = false;
    std::vector<std::int64_t> rows;  // turned: of the running step, for each of num_rows
  };
  struct Free {
    void operator()(float *memory) const { std::free(memory); }
  };
  struct Place {
    int outcomes = 0;
    std::vector<int> ahead, starts;          // [depth] places, and where their outcomes begin
    std::vector<int> context;                // [num_context] places
    std::unique_ptr<float[], Free> weights;  // [num_context * widest, outcomes]
    std::vector<float> bias;                 // [outcomes], from the first rows on
    std::vector<std::uint32_t> uses;         // [num_context * widest]
    Said said;
    float *out = nullptr;
  };
  // A feature that is set in some rows of what is learnt from: entries from `first` of `pairs_`.
  struct Pair {
    std::int32_t feature, row;
  };

  std::int32_t *chosen(std::int64_t row, int place);
  void find_chances(const Place &place, const std::int32_t *features, float *chances) const;
  void correct(Place &place, const Said &said, std::size_t first, std::size_t stop, float *sum);

  const MarkovShape shape_;
  const MarkovRule rule_;
  const int widest_;
  std::vector<Place> places_;
  std::vector<std::int32_t> chosen_;  // [num_rows, num_layers, top_k], -1: unknown
  std::vector<std::int32_t> chosen_before_;
  std::int64_t num_rows_ = 0;
  int top_k_ = 0;
  std::deque<Said> to_learn_;
  std::vector<Pair> pairs_;
  std::vector<std::size_t> groups_;  // of pairs_, where each feature's begin, and the end
  std::vector<float> sums_;          // [threads, outcomes]
};

}  // namespace moeserve
