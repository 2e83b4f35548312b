#include "router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace moeserve {
namespace {

struct Ranked {
  float value;
  int id;
};

// NaN counts as the largest, as in torch.
bool ranks_before(const Ranked &a, const Ranked &b) {
  return (std::isnan(a.value) && !std::isnan(b.value)) || a.value > b.value;
}

// Brings the `count` largest to the front, in falling order. Calls of the standard library as in
// torch.topk (ATen/native/TopKImpl.h), so that equal values come out alike.
void to_front(std::vector<Ranked> &ranked, int count) {
  const auto end_top = ranked.begin() + count;
  if (static_cast<std::size_t>(count) * 64 <= ranked.size()) {
    std::partial_sort(ranked.begin(), end_top, ranked.end(), ranks_before);
  } else {
    std::nth_element(ranked.begin(), end_top - 1, ranked.end(), ranks_before);
    std::sort(ranked.begin(), end_top - 1, ranks_before);
  }
}

// What one thread needs for a row.
struct RowMemory {
  std::vector<float> scores;
  std::vector<float> choice;
  std::vector<Ranked> ranked;
};

// Leaves the `count` largest in memory.ranked, in falling order, where they can stand in one order
// only; false where numbers are equal, or NaN, and the algorithm decides.
bool rank_distinct(int count, RowMemory &memory) {
  auto &kept = memory.ranked;  // and the next one, to know whether the last is larger
  kept.assign(static_cast<std::size_t>(count) + 1, {-std::numeric_limits<float>::infinity(), -1});
  int id = 0;
  for (const float value : memory.choice) {
    if (std::isnan(value)) return false;
    if (value > kept.back().value) {
      auto place = kept.end() - 1;
      for (; place != kept.begin() && value > (place - 1)->value; --place) *place = *(place - 1);
      *place = {value, id};
    }
    ++id;
  }
  for (std::size_t i = 0; i + 1 < kept.size(); ++i) {
    if (kept[i].value == kept[i + 1].value) return false;
  }
  return true;
}

float group_value(const float *choice, int size, bool top2) {
  float best = -std::numeric_limits<float>::infinity(), second = best;
  for (int i = 0; i < size; ++i) {
    if (choice[i] > best) {
      second = best;
      best = choice[i];
    } else if (choice[i] > second) {
      second = choice[i];
    }
  }
  return top2 ? best + second : best;
}

// Puts experts outside the best groups at -inf.
void mask_groups(const RouterRule &rule, RowMemory &memory) {
  const int size = rule.num_experts / rule.num_groups;
  memory.ranked.resize(static_cast<std::size_t>(rule.num_groups));
  for (int g = 0; g < rule.num_groups; ++g) {
    memory.ranked[static_cast<std::size_t>(g)] = {
        group_value(memory.choice.data() + g * size, size, rule.group_top2), g};
  }
  to_front(memory.ranked, rule.top_groups);
  for (auto group = memory.ranked.begin() + rule.top_groups; group != memory.ranked.end();
       ++group) {
    std::fill_n(memory.choice.begin() + group->id * size, size,
                -std::numeric_limits<float>::infinity());
  }
}

void choose(const Kernels &kernels, const RouterRule &rule, Dtype dtype, const float *logits,
            RowMemory &memory, std::int64_t *ids, float *weights) {
  memory.scores.assign(logits, logits + rule.num_experts);
  if (rule.score == RouterScore::kSoftmax) kernels.softmax(memory.scores.data(), rule.num_experts);
  if (rule.score == RouterScore::kSigmoid) kernels.sigmoid(memory.scores.data(), rule.num_experts);
  memory.choice = memory.scores;
  if (rule.correction != nullptr) {
    for (int e = 0; e < rule.num_experts; ++e) {
      memory.choice[static_cast<std::size_t>(e)] += rule.correction[e];
    }
  }
  if (rule.top_groups < rule.num_groups) mask_groups(rule, memory);
  if (!rank_distinct(rule.top_k, memory)) {
    memory.ranked.clear();
    for (int e = 0; e < rule.num_experts; ++e) {
      memory.ranked.push_back({memory.choice[static_cast<std::size_t>(e)], e});
    }
    to_front(memory.ranked, rule.top_k);
  }
  float sum = 0.0f;
  for (int k = 0; k < rule.top_k; ++k) {
    ids[k] = memory.ranked[static_cast<std::size_t>(k)].id;
    weights[k] = memory.scores[static_cast<std::size_t>(ids[k])];
  }
  if (rule.score == RouterScore::kSoftmaxOfTop) kernels.softmax(weights, rule.top_k);
  if (rule.normalize) {
    for (int k = 0; k < rule.top_k; ++k) sum += weights[k];
    for (int k = 0; k < rule.top_k; ++k) weights[k] /= sum + rule.normalize_eps;
  }
  for (int k = 0; k < rule.top_k; ++k) weights[k] *= rule.scale;
  if (rule.round_weights && dtype != Dtype::kF32) {
    std::vector<std::uint16_t> rounded(static_cast<std::size_t>(rule.top_k));
    kernels.from_float(dtype, weights, rounded.data(), rule.top_k);
    kernels.to_float(dtype, rounded.data(), weights, rule.top_k);
  }
}

// Rows below that are chosen for faster than another thread wakes up.
constexpr std::int64_t kAloneRows = 8;

}  // namespace

void route(Runtime &runtime, const Matrix &gate, const RouterRule &rule, Dtype dtype, const void *x,
           std::int64_t num_rows, std::int64_t x_stride, std::int64_t *ids, float *weights) {
  const std::lock_guard<std::mutex> lock(runtime.router_mutex);
  const auto experts = static_cast<std::size_t>(rule.num_experts);
  auto *logits = runtime.workspace.logits.take<float>(static_cast<std::size_t>(num_rows) * experts);
  linear(runtime, gate, dtype, x, num_rows, x_stride, Dtype::kF32, logits, rule.num_experts);
  const bool rounds = !rule.float32_logits && dtype != Dtype::kF32;
  const auto one = [&](std::int64_t row, RowMemory &memory) {
    float *own = logits + static_cast<std::size_t>(row) * experts;
    if (rounds) {
      memory.scores.resize(experts);
      auto *rounded = reinterpret_cast<std::uint16_t *>(memory.scores.data());
      runtime.kernels.from_float(dtype, own, rounded, rule.num_experts);
      runtime.kernels.to_float(dtype, rounded, own, rule.num_experts);
    }
    choose(runtime.kernels, rule, dtype, own, memory, ids + row * rule.top_k,
           weights + row * rule.top_k);
  };
  if (num_rows < kAloneRows) {
    RowMemory memory;
    for (std::int64_t row = 0; row < num_rows; ++row) one(row, memory);
    return;
  }
  runtime.pool.run([&](Worker &worker) {
    RowMemory memory;
    worker.share_rows(num_rows, [&](std::int64_t row) { one(row, memory); });
  });
}

}  // namespace moeserve
