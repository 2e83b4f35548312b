#include "markov_model.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <utility>

#include "predictor.h"

namespace moeserve {
namespace {

constexpr std::int64_t kAloneRows = 8;  // below, another thread wakes up too late
// Rows of weights stand apart in memory, and no hardware guesses where the next one is.
constexpr int kRowsAhead = 4;

void ask_for(const float *row, int count) {
  for (int i = 0; i < count; i += 16) __builtin_prefetch(row + i);
}

std::size_t at(std::int64_t row, std::size_t width, std::int64_t column = 0) {
  return static_cast<std::size_t>(row) * width + static_cast<std::size_t>(column);
}

}  // namespace

MarkovModel::MarkovModel(MarkovShape shape, MarkovRule rule)
    : shape_(std::move(shape)),
      rule_(std::move(rule)),
      widest_(*std::max_element(shape_.sizes.begin(), shape_.sizes.end())),
      places_(shape_.sizes.size()) {
  const int count = num_layers();
  const auto features = static_cast<std::size_t>(shape_.num_context) * widest_;
  for (int place = 0; place < count; ++place) {
    Place &own = places_[static_cast<std::size_t>(place)];
    for (int ahead = 1; ahead <= shape_.depth; ++ahead) {
      own.ahead.push_back((place + ahead) % count);
      own.starts.push_back(own.outcomes);
      own.outcomes += size_of(own.ahead.back());
    }
    for (int back = 0; back < shape_.num_context; ++back) {
      own.context.push_back(((place + shape_.depth - back) % count + count) % count);
    }
    // Pages that nothing was learnt for are no memory.
    void *zeros = std::calloc(features * static_cast<std::size_t>(own.outcomes), sizeof(float));
    if (zeros == nullptr) throw std::bad_alloc();
    own.weights.reset(static_cast<float *>(zeros));
    own.uses.assign(features, 0);
  }
}

std::int32_t *MarkovModel::chosen(std::int64_t row, int place) {
  return chosen_.data() +
         (static_cast<std::size_t>(row) * places_.size() + static_cast<std::size_t>(place)) *
             static_cast<std::size_t>(top_k_);
}

std::size_t MarkovModel::row_bytes() const {
  const int read = shape_.num_context * top_k_ * shape_.depth * widest_;
  return static_cast<std::size_t>(read) * sizeof(float);
}

void MarkovModel::turn(const std::int64_t *rows, const std::int64_t *before,
                       std::int64_t num_linked, std::int64_t num_rows, int top_k) {
  const std::size_t old_width = places_.size() * static_cast<std::size_t>(top_k_);
  const std::size_t width = places_.size() * static_cast<std::size_t>(top_k);
  std::swap(chosen_, chosen_before_);
  chosen_.assign(static_cast<std::size_t>(num_rows) * width, -1);
  if (old_width == width) {
    for (std::int64_t i = 0; i < num_linked; ++i) {
      std::copy_n(chosen_before_.data() + at(before[i], width), width,
                  chosen_.data() + at(rows[i], width));
    }
  }
  num_rows_ = num_rows;
  top_k_ = top_k;
  for (int place = 0; place < num_layers(); ++place) {
    Place &own = places_[static_cast<std::size_t>(place)];
    Said &said = own.said;
    const bool of_next_token = place >= num_layers() - shape_.depth;
    if (said.num_rows == 0 || said.is_turned || !of_next_token || old_width != width) {
      said.num_rows = 0;
      continue;
    }
    // Rows that nothing goes on from are left out.
    const auto wide = static_cast<std::size_t>(shape_.num_context) * top_k;
    const auto outcomes = static_cast<std::size_t>(own.outcomes);
    std::vector<std::int32_t> features(static_cast<std::size_t>(num_linked) * wide);
    std::vector<float> chances(static_cast<std::size_t>(num_linked) * outcomes);
    for (std::int64_t i = 0; i < num_linked; ++i) {
      std::copy_n(said.features.data() + at(before[i], wide), wide, features.data() + at(i, wide));
      std::copy_n(said.chances.data() + at(before[i], outcomes), outcomes,
                  chances.data() + at(i, outcomes));
    }
    said.features = std::move(features);
    said.chances = std::move(chances);
    said.rows.assign(rows, rows + num_linked);
    said.is_turned = true;
    said.num_rows = num_linked;
  }
}

void MarkovModel::forget() {
  for (Place &place : places_) place.said.num_rows = 0;
}

bool MarkovModel::see(int place, const std::int64_t *ids) {
  for (std::int64_t row = 0; row < num_rows_; ++row) {
    std::copy_n(ids + row * top_k_, top_k_, chosen(row, place));
  }
  // Whose furthest layer this one is: all that it spoke of has run.
  const int count = num_layers();
  const int source = ((place - shape_.depth) % count + count) % count;
  Place &own = places_[static_cast<std::size_t>(source)];
  Said &said = own.said;
  if (said.num_rows == 0) return false;
  for (std::int64_t i = 0; i < said.num_rows; ++i) {
    const std::int64_t row = said.is_turned ? said.rows[static_cast<std::size_t>(i)] : i;
    float *errors = said.chances.data() + at(i, static_cast<std::size_t>(own.outcomes));
    for (std::size_t ahead = 0; ahead < own.ahead.size(); ++ahead) {
      const std::int32_t *came = chosen(row, own.ahead[ahead]);
      for (int k = 0; k < top_k_; ++k) {
        if (came[k] < 0) {
          said.num_rows = 0;
          return false;
        }
        errors[own.starts[ahead] + came[k]] -= 1.0f;
      }
    }
  }
  said.place = source;
  to_learn_.push_back(std::exchange(said, Said{}));
  return true;
}

void MarkovModel::learn(Runtime &runtime) {
  if (to_learn_.empty()) return;
  const Said said = std::move(to_learn_.front());
  to_learn_.pop_front();
  Place &own = places_[static_cast<std::size_t>(said.place)];
  const auto outcomes = static_cast<std::size_t>(own.outcomes);
  const auto wide = said.features.size() / static_cast<std::size_t>(said.num_rows);

  const float bias_step = rule_.bias_step / static_cast<float>(said.num_rows);
  pairs_.clear();
  for (std::int64_t row = 0; row < said.num_rows; ++row) {
    const float *errors = said.chances.data() + at(row, outcomes);
    for (std::size_t o = 0; o < outcomes; ++o) own.bias[o] -= bias_step * errors[o];
    const std::int32_t *features = said.features.data() + at(row, wide);
    for (std::size_t i = 0; i < wide; ++i) {
      if (features[i] >= 0) pairs_.push_back({features[i], static_cast<std::int32_t>(row)});
    }
  }
  const auto before = [](const Pair &a, const Pair &b) {
    return a.feature != b.feature ? a.feature < b.feature : a.row < b.row;
  };
  const auto same = [](const Pair &a, const Pair &b) {
    return a.feature == b.feature && a.row == b.row;
  };
  std::sort(pairs_.begin(), pairs_.end(), before);
  pairs_.erase(std::unique(pairs_.begin(), pairs_.end(), same), pairs_.end());
  groups_.clear();
  for (std::size_t i = 0; i < pairs_.size(); ++i) {
    if (i == 0 || pairs_[i].feature != pairs_[i - 1].feature) groups_.push_back(i);
  }
  const auto num_groups = static_cast<std::int64_t>(groups_.size());
  groups_.push_back(pairs_.size());

  const bool alone = said.num_rows < kAloneRows;
  sums_.resize(outcomes * static_cast<std::size_t>(alone ? 1 : runtime.pool.num_threads()));
  const auto correct_group = [&](std::int64_t group, float *sum) {
    const auto g = static_cast<std::size_t>(group);
    if (g + kRowsAhead < static_cast<std::size_t>(num_groups)) {
      ask_for(own.weights.get() + at(pairs_[groups_[g + kRowsAhead]].feature, outcomes),
              own.outcomes);
    }
    correct(own, said, groups_[g], groups_[g + 1], sum);
  };
  if (alone) {
    for (std::int64_t group = 0; group < num_groups; ++group) correct_group(group, sums_.data());
    return;
  }
  runtime.pool.run([&](Worker &worker) {
    float *sum = sums_.data() + at(worker.index(), outcomes);
    worker.share(num_groups, [&](std::int64_t group) { correct_group(group, sum); });
  });
}

// The weights of one feature, by the mean of the errors in the rows that have it.
void MarkovModel::correct(Place &place, const Said &said, std::size_t first, std::size_t stop,
                          float *sum) {
  const auto outcomes = static_cast<std::size_t>(place.outcomes);
  const std::int32_t feature = pairs_[first].feature;
  std::uint32_t &uses = place.uses[static_cast<std::size_t>(feature)];
  uses = std::min(uses + 1, static_cast<std::uint32_t>(rule_.steps.size() - 1));
  const float step = rule_.steps[uses] / static_cast<float>(stop - first);
  const float *errors = said.chances.data() + at(pairs_[first].row, outcomes);
  if (stop - first > 1) {
    std::copy_n(errors, outcomes, sum);
    for (std::size_t i = first + 1; i < stop; ++i) {
      const float *more = said.chances.data() + at(pairs_[i].row, outcomes);
      for (std::size_t o = 0; o < outcomes; ++o) sum[o] += more[o];
    }
    errors = sum;
  }
  float *weights = place.weights.get() + at(feature, outcomes);
  for (std::size_t o = 0; o < outcomes; ++o) weights[o] -= step * errors[o];
}

void MarkovModel::say(Runtime &runtime, int place) {
  Place &own = places_[static_cast<std::size_t>(place)];
  if (own.bias.empty()) {  // as many as a token chooses, before anything is known
    const double share = std::min(static_cast<double>(top_k_) / widest_, 0.5);
    own.bias.assign(static_cast<std::size_t>(own.outcomes),
                    static_cast<float>(std::log(share / (1 - share))));
  }
  Said &said = own.said;
  const auto wide = static_cast<std::size_t>(shape_.num_context) * top_k_;
  const auto outcomes = static_cast<std::size_t>(own.outcomes);
  said.num_rows = num_rows_;
  said.is_turned = false;
  said.features.resize(static_cast<std::size_t>(num_rows_) * wide);
  said.chances.resize(static_cast<std::size_t>(num_rows_) * outcomes);
  const auto of_row = [&](std::int64_t row) {
    std::int32_t *features = said.features.data() + at(row, wide);
    for (int c = 0; c < shape_.num_context; ++c) {
      const std::int32_t *ids = chosen(row, own.context[static_cast<std::size_t>(c)]);
      for (int k = 0; k < top_k_; ++k) *features++ = ids[k] < 0 ? -1 : ids[k] + c * widest_;
    }
    find_chances(own, said.features.data() + at(row, wide),
                 said.chances.data() + at(row, outcomes));
  };
  if (num_rows_ < kAloneRows) {
    for (std::int64_t row = 0; row < num_rows_; ++row) of_row(row);
  } else {
    runtime.pool.run([&](Worker &worker) { worker.share(num_rows_, of_row); });
  }
  any_row(said.chances.data(), num_rows_, own.outcomes, own.outcomes, own.out);
}

void MarkovModel::find_chances(const Place &place, const std::int32_t *features,
                               float *chances) const {
  const auto outcomes = static_cast<std::size_t>(place.outcomes);
  const int wide = shape_.num_context * top_k_;
  const float *weights = place.weights.get();
  std::copy(place.bias.begin(), place.bias.end(), chances);
  for (int i = 0; i < wide; ++i) {
    if (i + kRowsAhead < wide && features[i + kRowsAhead] >= 0) {
      ask_for(weights + at(features[i + kRowsAhead], outcomes), place.outcomes);
    }
    if (features[i] < 0) continue;
    const float *row = weights + at(features[i], outcomes);
    for (std::size_t o = 0; o < outcomes; ++o) chances[o] += row[o];
  }
  for (std::size_t o = 0; o < outcomes; ++o) {
    const float logit = std::clamp(chances[o], -rule_.most_logit, rule_.most_logit);
    chances[o] = 1.0f / (1.0f + std::exp(-logit));
  }
}

}  // namespace moeserve
