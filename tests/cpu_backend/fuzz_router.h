// Routers and sums of pairs for the fuzz driver, with their oracles in double.
#pragma once

#include <numeric>
#include <set>

#include "fuzz_reference.h"
#include "pair_sum.h"
#include "router.h"

namespace fuzz {

// A random format that stores exactly so many columns.
inline PackedLayout random_layout(int rows, int cols) {
  const Kind kind = random_kind();
  const Kind plain = {Format::kF32, 0, false, false};
  return layout_of(usable_cols(kind, cols) == cols ? kind : plain, rows, cols);
}

// A matrix with random weights in such a format.
struct RandomMatrix {
  RandomMatrix(Runtime &runtime, int rows, int cols)
      : layout(random_layout(rows, cols)), panels(layout.bytes()) {
    pack_random(runtime, layout, panels.data(), first_ids(rows));
  }
  Matrix matrix() const { return {layout, panels.data(), nullptr}; }

  PackedLayout layout;
  Block<std::uint8_t> panels;
};

inline Block<float> random_floats(int count) {
  Block<float> numbers(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = normal();
  return numbers;
}

// -- routers --------------------------------------------------------------------------------------

inline RouterRule random_rule(int num_experts, const float *correction) {
  RouterRule rule = {};
  rule.num_experts = num_experts;
  rule.score = static_cast<RouterScore>(pick(0, 2));
  rule.num_groups = chance(0.3) && num_experts % 4 == 0 ? 4 : 1;
  rule.top_groups = pick(1, rule.num_groups);
  rule.top_k = pick(1, std::min(num_experts / rule.num_groups * rule.top_groups, 12));
  rule.float32_logits = chance(0.5);
  rule.normalize = chance(0.5);
  rule.normalize_eps = 1e-20f;
  rule.scale = chance(0.5) ? 1.0f : 2.5f;
  rule.group_top2 = chance(0.5) && num_experts / rule.num_groups > 1;
  rule.correction = chance(0.4) && rule.score != RouterScore::kSoftmaxOfTop ? correction : nullptr;
  rule.round_weights = chance(0.3);
  return rule;
}

inline std::vector<double> scores_of(const RouterRule &rule, const float *logits) {
  std::vector<double> scores(logits, logits + rule.num_experts);
  if (rule.score == RouterScore::kSigmoid) {
    for (double &score : scores) score = 1.0 / (1.0 + std::exp(-score));
  } else if (rule.score == RouterScore::kSoftmax) {
    const double largest = *std::max_element(scores.begin(), scores.end());
    for (double &score : scores) score = std::exp(score - largest);
    const double sum = std::accumulate(scores.begin(), scores.end(), 0.0);
    for (double &score : scores) score /= sum;
  }
  return scores;
}

// The groups that may be chosen from: those whose worth is at least that of the last one taken,
// less what rounding may change.
inline std::vector<bool> open_groups(const RouterRule &rule, const std::vector<double> &choice,
                                     double near) {
  const int size = rule.num_experts / rule.num_groups;
  std::vector<double> worth;
  for (int g = 0; g < rule.num_groups; ++g) {
    std::vector<double> own(choice.begin() + g * size, choice.begin() + (g + 1) * size);
    std::sort(own.rbegin(), own.rend());
    worth.push_back(rule.group_top2 ? own[0] + own[1] : own[0]);
  }
  std::vector<double> sorted = worth;
  std::sort(sorted.rbegin(), sorted.rend());
  const double last = sorted[static_cast<std::size_t>(rule.top_groups) - 1];
  std::vector<bool> open;
  for (const double w : worth) open.push_back(w >= last - near);
  return open;
}

// Ids must be different, in falling order, from open groups, and nothing clearly better left out.
inline void check_choice(const RouterRule &rule, const std::vector<double> &choice,
                         const std::int64_t *ids) {
  const double near = 1e-5;  // of scores
  const auto open = open_groups(rule, choice, near);
  const int size = rule.num_experts / rule.num_groups;
  std::set<std::int64_t> chosen;
  double last = INFINITY;
  for (int k = 0; k < rule.top_k; ++k) {
    const std::int64_t id = ids[k];
    if (id < 0 || id >= rule.num_experts || !chosen.insert(id).second) fail("ids are no choice");
    if (!open[static_cast<std::size_t>(id / size)]) fail("an expert of a group that is closed");
    const double score = choice[static_cast<std::size_t>(id)];
    if (score > last + near) fail("experts are not in falling order");
    last = score;
  }
  const auto num_open = std::count(open.begin(), open.end(), true);
  if (num_open > rule.top_groups) return;  // groups as good as each other: either may be taken
  for (int e = 0; e < rule.num_experts; ++e) {
    const bool left_out = open[static_cast<std::size_t>(e / size)] && chosen.count(e) == 0;
    if (left_out && choice[static_cast<std::size_t>(e)] > last + near) {
      fail("a better expert was left out");
    }
  }
}

inline void check_weights(const RouterRule &rule, Dtype dtype, const std::vector<double> &scores,
                          const std::int64_t *ids, const float *weights) {
  std::vector<double> own;
  for (int k = 0; k < rule.top_k; ++k) own.push_back(scores[static_cast<std::size_t>(ids[k])]);
  if (rule.score == RouterScore::kSoftmaxOfTop) {
    const double largest = *std::max_element(own.begin(), own.end());
    for (double &w : own) w = std::exp(w - largest);
    const double sum = std::accumulate(own.begin(), own.end(), 0.0);
    for (double &w : own) w /= sum;
  }
  double sum = 1.0;
  if (rule.normalize) sum = std::accumulate(own.begin(), own.end(), 0.0) + rule.normalize_eps;
  for (std::size_t k = 0; k < own.size(); ++k) {
    const double expected = own[k] / sum * rule.scale;
    const double bound = 1e-4 * std::fabs(expected) + 1e-6;
    check(weights[k], expected, bound + (rule.round_weights ? rounding(dtype, expected) : 0.0),
          "weight " + std::to_string(k));
  }
}

inline void fuzz_router(Runtime &runtime) {
  const int num_experts = chance(0.3) ? 4 * pick(1, 40) : pick(1, 140);
  const int hidden = pick(1, 100), rows = pick(1, 30);
  const RandomMatrix gate(runtime, num_experts, hidden);
  const Block<float> correction = random_floats(num_experts);
  const RouterRule rule = random_rule(num_experts, correction.data());
  context += ", router, " + std::to_string(rows) + " rows, top " + std::to_string(rule.top_k) +
             " of " + std::to_string(num_experts);
  Numbers x = Numbers::random(rows, hidden);
  if (chance(0.2)) {  // rows alike, so that experts are, too
    for (int c = 0; c < hidden; ++c) x.set(0, c, 0.0f);
  }
  const auto choices = static_cast<std::size_t>(rows * rule.top_k);
  Block<std::int64_t> ids(choices);
  Block<float> weights(choices);
  const Matrix matrix = gate.matrix();
  route(runtime, matrix, rule, x.dtype, x.bytes.data(), rows, x.stride, ids.data(), weights.data());

  Block<float> logits(static_cast<std::size_t>(rows * num_experts));
  linear(runtime, matrix, x.dtype, x.bytes.data(), rows, x.stride, Dtype::kF32, logits.data(),
         num_experts);
  for (int r = 0; r < rows; ++r) {
    float *own = logits.data() + r * num_experts;
    if (!rule.float32_logits) {
      Block<std::uint8_t> rounded(static_cast<std::size_t>(num_experts) * size_of(x.dtype));
      runtime.kernels.from_float(x.dtype, own, rounded.data(), num_experts);
      runtime.kernels.to_float(x.dtype, rounded.data(), own, num_experts);
    }
    const bool finite = std::all_of(own, own + num_experts, [](float l) { return l - l == 0; });
    if (!finite) continue;
    const std::vector<double> scores = scores_of(rule, own);
    std::vector<double> choice = scores;
    for (int e = 0; e < num_experts && rule.correction != nullptr; ++e) {
      choice[static_cast<std::size_t>(e)] += rule.correction[e];
    }
    check_choice(rule, choice, ids.data() + r * rule.top_k);
    check_weights(rule, x.dtype, scores, ids.data() + r * rule.top_k,
                  weights.data() + r * rule.top_k);
  }
}

// -- sums of pairs --------------------------------------------------------------------------------

inline void fuzz_pair_sum(Runtime &runtime) {
  const int tokens = pick(0, 40), top_k = pick(1, 8), hidden = pick(1, 120);
  context += ", pairs, " + std::to_string(tokens) + " tokens of " + std::to_string(hidden);
  const auto choices = static_cast<std::size_t>(tokens * top_k);
  const Block<float> pairs = random_floats(tokens * top_k * hidden);
  const Block<float> weights = random_floats(tokens * top_k);
  Block<std::int64_t> ids(choices);
  for (std::size_t i = 0; i < choices; ++i) ids[i] = pick(0, 9);
  Numbers y(static_cast<Dtype>(pick(0, 2)), tokens, hidden);
  Block<std::uint8_t> out(static_cast<std::size_t>(tokens * hidden) * size_of(y.dtype));
  sum_pairs(runtime,
            {pairs.data(), ids.data(), weights.data(), tokens, top_k, hidden, y.dtype, out.data()});
  Block<float> found(static_cast<std::size_t>(tokens * hidden));
  runtime.kernels.to_float(y.dtype, out.data(), found.data(), tokens * hidden);
  for (int t = 0; t < tokens; ++t) {
    for (int n = 0; n < hidden; ++n) {
      double sum = 0.0, magnitude = 0.0;
      for (int k = 0; k < top_k; ++k) {
        const int pair = t * top_k + k;
        const double term = static_cast<double>(weights[static_cast<std::size_t>(pair)]) *
                            static_cast<double>(pairs[static_cast<std::size_t>(pair * hidden + n)]);
        sum += term;
        magnitude += std::fabs(term);
      }
      check(found[static_cast<std::size_t>(t * hidden + n)], sum,
            0x1p-22 * magnitude + rounding(y.dtype, sum), "token " + std::to_string(t));
    }
  }
}

}  // namespace fuzz
