#include "expert_parts.h"

#include <algorithm>

#include "pair_sum.h"

namespace moeserve {

void ExpertParts::begin(const PartsJob &job) {
  job_ = job;
  const auto pairs = static_cast<std::size_t>(job.num_pairs());
  const std::size_t bytes = pairs * static_cast<std::size_t>(job.hidden) * sizeof(float);
  pairs_ = static_cast<float *>(pair_memory_.take(bytes));
  is_there_.assign(pairs, 0);
  chosen_.clear();
  prepared_for_ = nullptr;
  num_ids_ = 0;
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    num_ids_ = std::max(num_ids_, static_cast<std::size_t>(job.ids[pair]) + 1);
  }
}

std::int64_t ExpertParts::select(const std::vector<int> &experts) {
  wanted_.assign(num_ids_, 0);
  for (const int expert : experts) {
    const auto at = static_cast<std::size_t>(expert);
    if (at < num_ids_) wanted_[at] = 1;
  }
  chosen_.clear();
  for (std::int64_t pair = 0; pair < job_.num_pairs(); ++pair) {
    if (wanted_[static_cast<std::size_t>(job_.ids[pair])] != 0) chosen_.push_back(pair);
  }
  return static_cast<std::int64_t>(chosen_.size());
}

void ExpertParts::add(Runtime &runtime, const Experts &experts) {
  if (chosen_.empty()) return;
  ExpertJob part = {};
  part.dtype = job_.dtype;
  part.x = job_.x;
  part.num_tokens = job_.num_tokens;
  part.x_stride = job_.x_stride;
  part.num_lists = 1;
  part.lists[0] = {&experts, job_.ids, nullptr, job_.top_k, wanted_.data()};
  part.apart = pairs_;
  part.input = &input_;
  part.is_prepared = prepared_for_ == &experts && prepared_by_ == &runtime.kernels;
  run_experts(runtime, part);
  prepared_for_ = &experts;
  prepared_by_ = &runtime.kernels;
  for (const std::int64_t pair : chosen_) is_there_[static_cast<std::size_t>(pair)] = 1;
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
