// Predictors for the fuzz driver: chances within their range, and trained views beside the formula
// in double.
#pragma once

#include <memory>

#include "fuzz_router.h"
#include "lookahead_predictor.h"
#include "markov_model.h"
#include "residual_predictor.h"

namespace fuzz {

// A step's rows at one layer, with arrays of exactly their sizes.
struct RandomRows {
  RandomRows(int count, int hidden, int num_experts, int top_k)
      : x(Numbers::random(count, hidden)),
        ids(static_cast<std::size_t>(count * top_k)),
        weights(static_cast<std::size_t>(count * top_k)) {
    for (std::size_t i = 0; i < ids.size(); ++i) {
      ids[i] = pick(0, num_experts - 1);
      weights[i] = 0.1f + std::fabs(normal());
    }
    rows = {x.dtype, x.bytes.data(), count, x.stride, ids.data(), weights.data(), top_k};
  }

  Numbers x;
  Block<std::int64_t> ids;
  Block<float> weights;
  RoutedRows rows;
};

inline void check_chances(const Block<float> &out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (!(out[i] >= 0.0f && out[i] <= 1.0f)) {
      fail("expert " + std::to_string(i) + " has a chance of " + std::to_string(out[i]));
    }
  }
}

inline void fuzz_lookahead(Runtime &runtime) {
  const int layers = pick(1, 4), experts = pick(1, 40), hidden = pick(1, 120);
  const int top_k = pick(1, std::min(experts, 8));
  context += ", lookahead, " + std::to_string(layers) + " layers of " + std::to_string(experts) +
             ", H " + std::to_string(hidden) + ", top " + std::to_string(top_k);
  const auto bins = static_cast<std::size_t>(pick(1, 256));
  LookaheadPredictor predictor(layers, experts, top_k, {8.0f, 20.0, 0.1, 1e-4, pick(1, 3)},
                               std::vector<double>(bins, 1.0), std::vector<double>(bins, 2.0));
  std::vector<RandomMatrix> gates;
  std::vector<Block<float>> outs;
  for (int place = 0; place < layers; ++place) {
    const int ahead = std::min(pick(0, 3), layers - 1 - place);
    gates.emplace_back(runtime, std::max(ahead, 1) * experts, hidden);
    outs.emplace_back(static_cast<std::size_t>(ahead * experts));
    if (ahead > 0) predictor.set_view(place, gates.back().matrix(), ahead, outs.back().data());
  }
  for (int step = 0; step < 6; ++step) {
    const int rows = chance(0.5) ? 1 : pick(0, 30);
    for (int place = 0; place < layers; ++place) {
      RandomRows given(rows, hidden, experts, top_k);
      if (rows > 0 && chance(0.1)) given.x.spoil(pick(0, rows - 1));
      predictor.predict(runtime, place, given.rows);
      check_chances(outs[static_cast<std::size_t>(place)]);
    }
  }
}

inline void fuzz_markov(Runtime &runtime) {
  const int layers = pick(1, 5), top_k = pick(1, 4);
  std::vector<int> sizes;
  for (int place = 0; place < layers; ++place) sizes.push_back(pick(1, 40));
  const int depth = pick(1, layers), num_context = pick(1, layers);
  context += ", markov, " + std::to_string(layers) + " layers, depth " + std::to_string(depth) +
             ", context " + std::to_string(num_context) + ", top " + std::to_string(top_k);
  MarkovModel model({sizes, depth, num_context}, {{0.1f, 0.05f, 0.02f}, 0.01f, 9.0f});
  std::vector<Block<float>> outs;
  for (int place = 0; place < layers; ++place) {
    outs.emplace_back(static_cast<std::size_t>(model.num_outcomes(place)));
    model.set_out(place, outs.back().data());
  }
  int rows = 0, to_learn = 0;
  for (int step = 0; step < 12; ++step) {
    const int last = rows;
    rows = chance(0.5) ? 1 : pick(1, 30);
    std::vector<std::int64_t> own, before;
    for (int row = 0; row < rows; ++row) {
      if (last > 0 && chance(0.8)) {
        own.push_back(row);
        before.push_back(pick(0, last - 1));
      }
    }
    model.turn(own.data(), before.data(), static_cast<std::int64_t>(own.size()), rows, top_k);
    for (int place = 0; place < layers; ++place) {
      if (chance(0.1)) model.forget();
      Block<std::int64_t> ids(static_cast<std::size_t>(rows * top_k));
      for (std::size_t i = 0; i < ids.size(); ++i) {
        ids[i] = pick(0, sizes[static_cast<std::size_t>(place)] - 1);  // also twice in a row
      }
      to_learn += model.see(place, ids.data()) ? 1 : 0;
      if (chance(0.7)) {
        for (; to_learn > 0; --to_learn) model.learn(runtime);
      }
      model.say(runtime, place);
      check_chances(outs[static_cast<std::size_t>(place)]);
    }
  }
}

// A trained view's arrays. Numbers are small, so that chances are none of 0 and 1.
struct RandomView {
  RandomView(Runtime &runtime, int ahead, int experts, int hidden, int rank, int next_rank)
      : outputs((ahead * experts + 15) / 16 * 16),
        rank(ahead > 0 ? rank : 0),
        units(16 * pick(1, 2)),
        products(runtime, outputs + 2 * this->rank + next_rank, hidden),
        expert_panels(bytes_like(products.layout, experts * units, hidden)),
        unit_bias(random_floats(experts * units)),
        bias(random_floats(outputs + this->rank)),
        chosen(random_floats(experts * (outputs + this->rank))),
        context_out(random_floats(this->rank * outputs)),
        expert_out(random_floats(experts * units * outputs)),
        out(static_cast<std::size_t>(ahead * experts)) {
    const PackedLayout &layout = products.layout;
    unit_layout = make_layout(layout.format, experts * units, hidden, layout.group_cols,
                              layout.asymmetric, layout.weight_only);
    pack_random(runtime, unit_layout, expert_panels.data(), first_ids(experts * units));
    for (std::size_t i = 0; i < context_out.size(); ++i) context_out[i] *= 0.1f;
    for (std::size_t i = 0; i < expert_out.size(); ++i) expert_out[i] *= 0.1f;
    view.num_ahead = ahead;
    view.outputs = outputs;
    view.rank = this->rank;
    view.next_rank = next_rank;
    view.units = units;
    view.products = products.matrix();
    view.expert_in = {unit_layout, expert_panels.data(), unit_bias.data()};
    view.bias = bias.data();
    view.chosen = chosen.data();
    view.context_out = context_out.data();
    view.expert_out = expert_out.data();
    view.out = out.data();
  }
  RandomView(const RandomView &) = delete;  // view points into it

  static std::size_t bytes_like(const PackedLayout &like, int rows, int cols) {
    return make_layout(like.format, rows, cols, like.group_cols, like.asymmetric, like.weight_only)
        .bytes();
  }

  int outputs, rank, units;
  RandomMatrix products;
  PackedLayout unit_layout = {};
  Block<std::uint8_t> expert_panels;
  Block<float> unit_bias, bias, chosen, context_out, expert_out, out;
  ResidualView view = {};
};

// y of the matrix for rows of float32.
inline std::vector<float> times(Runtime &runtime, const Matrix &matrix,
                                const std::vector<float> &states, int rows) {
  std::vector<float> y(static_cast<std::size_t>(rows * matrix.layout.rows));
  linear(runtime, matrix, Dtype::kF32, states.data(), rows, matrix.layout.cols, Dtype::kF32,
         y.data(), matrix.layout.rows);
  return y;
}

inline double silu_of(double x) { return x / (1.0 + std::exp(-x)); }

// The chances of one row, without a past.
inline std::vector<double> plain_chances(const RandomView &own, const RandomRows &given, int row,
                                         const float *product, const std::vector<float> &units) {
  const int stride = own.outputs + own.rank, top_k = given.rows.top_k;
  const auto at = [&](int k) { return static_cast<std::size_t>(row * top_k + k); };
  double mean = 0.0;
  for (int k = 0; k < top_k; ++k) mean += given.weights[at(k)] / top_k;
  std::vector<double> total;
  for (int i = 0; i < stride; ++i) {
    double sum = product[i] + own.bias[static_cast<std::size_t>(i)];
    for (int k = 0; k < top_k; ++k) {
      sum += given.weights[at(k)] / mean *
             own.chosen[static_cast<std::size_t>(given.ids[at(k)] * stride + i)];
    }
    total.push_back(sum);
  }
  std::vector<double> chances;
  for (int n = 0; n < own.outputs; ++n) {
    double sum = total[static_cast<std::size_t>(n)];
    for (int r = 0; r < own.rank; ++r) {
      sum += silu_of(total[static_cast<std::size_t>(own.outputs + r)]) *
             own.context_out[static_cast<std::size_t>(r * own.outputs + n)];
    }
    for (int k = 0; k < top_k; ++k) {
      for (int u = 0; u < own.units; ++u) {
        const auto unit = static_cast<std::size_t>(given.ids[at(k)] * own.units + u);
        const std::size_t all = own.unit_bias.size();
        sum += silu_of(units[static_cast<std::size_t>(row) * all + unit]) * given.weights[at(k)] /
               mean *
               own.expert_out[unit * static_cast<std::size_t>(own.outputs) +
                              static_cast<std::size_t>(n)];
      }
    }
    chances.push_back(1.0 / (1.0 + std::exp(-sum)));
  }
  return chances;
}

inline void check_residual(Runtime &runtime, const RandomView &own, const RandomRows &given,
                           int experts) {
  const int rows = static_cast<int>(given.rows.num_rows), hidden = own.view.products.layout.cols;
  std::vector<float> states;
  for (int r = 0; r < rows; ++r) {
    const std::vector<double> x = row_of(given.x, r);
    double squares = 0.0;
    for (const double number : x) squares += number * number;
    const double size = std::sqrt(squares / hidden + 1e-12);
    for (const double number : x) states.push_back(static_cast<float>(number / size));
  }
  const auto products = times(runtime, own.view.products, states, rows);
  const auto units = times(runtime, own.view.expert_in, states, rows);
  std::vector<double> missed(own.out.size(), 1.0);
  for (int r = 0; r < rows; ++r) {
    const float *product = products.data() + r * own.view.products.layout.rows;
    const auto chances = plain_chances(own, given, r, product, units);
    for (std::size_t n = 0; n < missed.size(); ++n) missed[n] *= 1.0 - chances[n];
  }
  for (std::size_t n = 0; n < missed.size(); ++n) {
    // The state's last bit differs, and with it where a number is rounded to 8 bits.
    check(own.out[n], 1.0 - missed[n], 0.1,
          "layer ahead " + std::to_string(static_cast<int>(n) / experts) + ", expert " +
              std::to_string(static_cast<int>(n) % experts));
  }
}

inline void fuzz_residual(Runtime &runtime) {
  const int layers = pick(1, 4), experts = pick(1, 24), hidden = pick(1, 120);
  const int top_k = pick(1, 6), rank = 16 * pick(0, 3);
  context += ", residual, " + std::to_string(layers) + " layers of " + std::to_string(experts) +
             ", H " + std::to_string(hidden) + ", rank " + std::to_string(rank);
  ResidualPredictor predictor(layers, experts);
  std::vector<std::unique_ptr<RandomView>> views;
  for (int place = 0; place < layers; ++place) {
    const int ahead = std::min(pick(1, 3), layers - 1 - place);
    const int next_rank = place > 0 ? rank : 0;
    views.push_back(nullptr);
    if (ahead == 0 && next_rank == 0) continue;  // nothing to compute
    views.back() = std::make_unique<RandomView>(runtime, ahead, experts, hidden, rank, next_rank);
    predictor.set_view(place, views.back()->view);
  }
  int before = 0;
  for (int step = 0; step < 5; ++step) {
    const int rows = chance(0.5) ? 1 : pick(0, 30);
    const bool told = chance(0.5);
    if (told) {
      Block<std::int64_t> previous(static_cast<std::size_t>(chance(0.9) ? rows : pick(0, 9)));
      for (std::size_t i = 0; i < previous.size(); ++i) previous[i] = pick(-1, before);
      predictor.begin_step(previous.data(), static_cast<std::int64_t>(previous.size()));
    }
    for (int place = 0; place < layers; ++place) {
      if (chance(0.1)) continue;
      RandomRows given(rows, hidden, experts, top_k);
      const bool spoilt = rows > 0 && chance(0.1);
      if (spoilt) given.x.spoil(pick(0, rows - 1));
      const RandomView *own = views[static_cast<std::size_t>(place)].get();
      const bool says = predictor.predict(runtime, place, given.rows);
      if (own == nullptr || !says || spoilt) continue;
      if (step == 0) check_residual(runtime, *own, given, experts);
    }
    before = rows;
  }
}

}  // namespace fuzz
