#include "lookahead_predictor.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace moeserve {
namespace {

constexpr std::int64_t kAloneRows = 8;  // below, another thread wakes up too late

}  // namespace

BinChances::BinChances(const CalibrationRule &rule, std::vector<double> hits,
                       std::vector<double> counts)
    : rule_(rule), hits_(std::move(hits)), counts_(std::move(counts)), table_(hits_.size()) {
  refresh();
}

void BinChances::add(const std::uint8_t *bins, std::int64_t num_rows, int num_experts,
                     const std::int64_t *ids, int top_k) {
  const double fade = std::exp2(-static_cast<double>(num_rows) / rule_.half_life_tokens);
  for (double &each : hits_) each *= fade;
  for (double &each : counts_) each *= fade;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const std::uint8_t *own = bins + row * num_experts;
    for (int e = 0; e < num_experts; ++e) counts_[own[e]] += 1;
    for (int k = 0; k < top_k; ++k) hits_[own[ids[row * top_k + k]]] += 1;
  }
  refresh();
}

void BinChances::refresh() {
  const std::size_t last = table_.size() - 1;
  const double side = rule_.neighbour, own = 1 - 2 * side;
  const auto smooth = [&](const std::vector<double> &x, std::size_t i) {
    return side * x[i > 0 ? i - 1 : 0] + own * x[i] + side * x[i < last ? i + 1 : last];
  };
  for (std::size_t i = 0; i <= last; ++i) {
    const double chance = smooth(hits_, i) / std::max(smooth(counts_, i), 1e-9);
    table_[i] = static_cast<float>(std::clamp(chance, rule_.least_chance, 1 - rule_.least_chance));
  }
}

LookaheadPredictor::LookaheadPredictor(int num_layers, int num_experts, int top_k,
                                       const CalibrationRule &rule, std::vector<double> hits,
                                       std::vector<double> counts)
    : num_experts_(num_experts),
      top_k_(top_k),
      rule_(rule),
      at_start_(rule, std::move(hits), std::move(counts)),
      views_(static_cast<std::size_t>(num_layers)) {}

void LookaheadPredictor::set_view(int place, const Matrix &gates, int num_ahead, float *out) {
  View &view = views_[static_cast<std::size_t>(place)] = View{};
  view.gates = gates;
  view.num_ahead = num_ahead;
  view.out = out;
  view.chances.assign(static_cast<std::size_t>(num_ahead), at_start_);
}

bool LookaheadPredictor::is_brief(int place, std::int64_t num_rows) const {
  const View &view = views_[static_cast<std::size_t>(place)];
  return num_rows < kAloneRows && is_alone(view.gates, num_rows);
}

bool LookaheadPredictor::predict(Runtime &runtime, int place, const RoutedRows &rows) {
  if (place <= place_) {
    ++step_;
    for (View &view : views_) view.num_rows = 0;
  }
  place_ = place;
  learn(place, rows);
  View &view = views_[static_cast<std::size_t>(place)];
  if (view.num_ahead == 0 || rows.num_rows == 0) return false;
  const std::int64_t count = rows.num_rows, outputs = std::int64_t{view.num_ahead} * num_experts_;
  auto *scores = scores_.take<float>(count_of(count, outputs));
  linear(runtime, view.gates, rows.dtype, rows.x, count, rows.x_stride, Dtype::kF32, scores,
         outputs);
  if (view.units.empty()) find_units(view, scores, count);
  const std::int64_t threads = runtime.pool.num_threads();
  auto *bins = bins_.take<std::uint8_t>(count_of(count, outputs));
  auto *sorted = sorted_.take<float>(count_of(threads, num_experts_));
  runtime.pool.run(
      [&](Worker &worker) {
        worker.share(count, [&](std::int64_t row) {
          bins_of(view, scores, count, row, sorted + worker.index() * num_experts_, bins);
        });
      },
      count < kAloneRows);
  if (step_ % rule_.every_steps == 0) {
    view.bins.assign(bins, bins + count_of(count, outputs));
    view.num_rows = count;
  }
  for (int ahead = 0; ahead < view.num_ahead; ++ahead) {
    const std::vector<float> &table = view.chances[static_cast<std::size_t>(ahead)].table();
    const std::uint8_t *own = bins + count_of(ahead * count, num_experts_);
    float *chances = scores;  // no longer needed
    for (std::size_t i = 0; i < count_of(count, num_experts_); ++i) chances[i] = table[own[i]];
    any_row(chances, count, num_experts_, num_experts_, view.out + ahead * num_experts_);
  }
  return true;
}

// What was said of the layer at `place`, compared with what it chose.
void LookaheadPredictor::learn(int place, const RoutedRows &rows) {
  for (int behind = 0; behind < place; ++behind) {
    View &view = views_[static_cast<std::size_t>(behind)];
    const int ahead = place - behind - 1;
    if (view.num_rows == 0 || view.num_rows != rows.num_rows || ahead >= view.num_ahead) continue;
    view.chances[static_cast<std::size_t>(ahead)].add(
        view.bins.data() + count_of(ahead * view.num_rows, num_experts_), view.num_rows,
        num_experts_, rows.ids, rows.top_k);
  }
}

// The mean over the rows of the standard deviation of their scores.
void LookaheadPredictor::find_units(View &view, const float *scores, std::int64_t num_rows) const {
  for (int ahead = 0; ahead < view.num_ahead; ++ahead) {
    double total = 0.0;
    for (std::int64_t row = 0; row < num_rows; ++row) {
      const float *own = scores + (row * view.num_ahead + ahead) * num_experts_;
      double sum = 0.0, squares = 0.0;
      for (int e = 0; e < num_experts_; ++e) sum += own[e];
      const double mean = sum / num_experts_;
      for (int e = 0; e < num_experts_; ++e) squares += (own[e] - mean) * (own[e] - mean);
      total += std::sqrt(squares / num_experts_);
    }
    view.units.push_back(static_cast<float>(total / static_cast<double>(num_rows) + 1e-12));
  }
}

// How far each score of a row stands above the border between the top_k and the others, in bins.
void LookaheadPredictor::bins_of(const View &view, const float *scores, std::int64_t num_rows,
                                 std::int64_t row, float *sorted, std::uint8_t *bins) const {
  const int border = num_experts_ - top_k_;
  const auto num_bins = static_cast<float>(at_start_.table().size());
  for (int ahead = 0; ahead < view.num_ahead; ++ahead) {
    const float *own = scores + (row * view.num_ahead + ahead) * num_experts_;
    std::uint8_t *result = bins + count_of(ahead * num_rows + row, num_experts_);
    if (border == 0) {
      std::fill_n(result, num_experts_, static_cast<std::uint8_t>(num_bins - 1));
      continue;
    }
    // NaN has no order to select by.
    std::transform(own, own + num_experts_, sorted, [](float score) {
      return std::isnan(score) ? std::numeric_limits<float>::lowest() : score;
    });
    std::nth_element(sorted, sorted + border, sorted + num_experts_);
    const float middle = (*std::max_element(sorted, sorted + border) + sorted[border]) * 0.5f;
    const float scale = rule_.bins_per_unit / view.units[static_cast<std::size_t>(ahead)];
    for (int e = 0; e < num_experts_; ++e) {
      const float place = (own[e] - middle) * scale + std::floor(num_bins / 2);
      const float bounded = place > 0.0f ? std::min(place, num_bins - 1) : 0.0f;  // NaN: 0
      result[e] = static_cast<std::uint8_t>(bounded);
    }
  }
}

}  // namespace moeserve
