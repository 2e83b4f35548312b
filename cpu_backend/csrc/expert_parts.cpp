#include "expert_parts.h"

#include <algorithm>
#include <cstring>

#include "pair_sum.h"

namespace moeserve {

void ExpertParts::begin(const PartsJob &job) {
  job_ = job;
  const auto pairs = static_cast<std::size_t>(job.num_pairs());
  const std::size_t bytes = pairs * static_cast<std::size_t>(job.hidden) * sizeof(float);
  pairs_ = static_cast<float *>(pair_memory_.take(bytes));
  is_there_.assign(pairs, 0);
  chosen_.clear();
}

std::int64_t ExpertParts::select(const std::vector<int> &experts) {
  wanted_.clear();
  for (const int expert : experts) {
    const auto at = static_cast<std::size_t>(expert);
    if (at >= wanted_.size()) wanted_.resize(at + 1, 0);
    wanted_[at] = 1;
  }
  chosen_.clear();
  ids_.clear();
  for (std::int64_t pair = 0; pair < job_.num_pairs(); ++pair) {
    const auto id = static_cast<std::size_t>(job_.ids[pair]);
    if (id >= wanted_.size() || wanted_[id] == 0) continue;
    chosen_.push_back(pair);
    ids_.push_back(job_.ids[pair]);
  }
  return static_cast<std::int64_t>(chosen_.size());
}

void ExpertParts::add(Runtime &runtime, const Experts &experts) {
  if (chosen_.empty()) return;
  const auto count = static_cast<std::int64_t>(chosen_.size());
  const auto row_bytes = static_cast<std::size_t>(job_.hidden) * sizeof(float);
  ones_.resize(chosen_.size(), 1.0f);

  ExpertJob part = {};
  part.dtype = job_.dtype;
  part.num_tokens = count;
  part.x = job_.x;  // of one row, the same again and again
  if (job_.num_tokens > 1) {
    const std::size_t bytes = static_cast<std::size_t>(job_.hidden) * size_of(job_.dtype);
    auto *rows = static_cast<std::uint8_t *>(row_memory_.take(chosen_.size() * bytes));
    const auto *x = static_cast<const std::uint8_t *>(job_.x);
    const std::size_t apart = static_cast<std::size_t>(job_.x_stride) * size_of(job_.dtype);
    for (std::size_t i = 0; i < chosen_.size(); ++i) {
      const auto token = static_cast<std::size_t>(chosen_[i] / job_.top_k);
      std::memcpy(rows + i * bytes, x + token * apart, bytes);
    }
    part.x = rows;
    part.x_stride = job_.hidden;
  }
  part.num_lists = 1;
  part.lists[0] = {&experts, ids_.data(), ones_.data(), 1, nullptr};
  part.y_dtype = Dtype::kF32;
  const bool together = chosen_.back() - chosen_.front() + 1 == count;
  part.y = together ? row(chosen_.front()) : result_memory_.take(chosen_.size() * row_bytes);
  run_experts(runtime, part);
  if (together) {
    std::fill_n(is_there_.begin() + chosen_.front(), count, std::uint8_t{1});
  } else {
    put(chosen_.data(), count, static_cast<const float *>(part.y));
  }
  chosen_.clear();
}

void ExpertParts::put(const std::int64_t *pairs, std::int64_t count, const float *results) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::copy_n(results + i * job_.hidden, job_.hidden, row(pairs[i]));
    is_there_[static_cast<std::size_t>(pairs[i])] = 1;
  }
}

void ExpertParts::total(Runtime &runtime, const float *weights, Dtype y_dtype, void *y) {
  for (std::int64_t pair = 0; pair < job_.num_pairs(); ++pair) {
    if (is_there_[static_cast<std::size_t>(pair)] == 0) {
      std::fill_n(row(pair), job_.hidden, 0.0f);
    }
  }
  PairSum sum = {};
  sum.pairs = pairs_;
  sum.ids = job_.ids;
  sum.weights = weights;
  sum.num_tokens = job_.num_tokens;
  sum.top_k = job_.top_k;
  sum.hidden = job_.hidden;
  sum.y_dtype = y_dtype;
  sum.y = y;
  if (job_.num_tokens > 0) sum_pairs(runtime, sum);
}

}  // namespace moeserve
