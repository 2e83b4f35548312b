#include "pair_sum.h"

#include <algorithm>
#include <array>
#include <vector>

#include "packed.h"

namespace moeserve {
namespace {

constexpr std::int64_t kAloneNumbers = 1 << 15;  // below, waking threads costs more than it brings

}  // namespace

void sum_pairs(Runtime &runtime, const PairSum &sum) {
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  const Kernels &kernels = runtime.kernels;
  const std::int64_t whole = sum.hidden / kPanelOutputs * kPanelOutputs;
  const auto token = [&](std::int64_t t, float *total, std::vector<int> &order) {
    const std::int64_t *ids = sum.ids + t * sum.top_k;
    order.resize(static_cast<std::size_t>(sum.top_k));
    for (int k = 0; k < sum.top_k; ++k) order[static_cast<std::size_t>(k)] = k;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return ids[a] < ids[b]; });
    std::fill_n(total, whole + kPanelOutputs, 0.0f);
    for (const int k : order) {
      const float *pair = sum.pairs + (t * sum.top_k + k) * sum.hidden;
      const float weight = sum.weights[t * sum.top_k + k];
      kernels.accumulate(total, pair, nullptr, weight, static_cast<int>(whole));
      if (whole < sum.hidden) {  // the kernel adds whole panels
        std::array<float, kPanelOutputs> tail = {};
        std::copy(pair + whole, pair + sum.hidden, tail.begin());
        kernels.accumulate(total + whole, tail.data(), nullptr, weight, kPanelOutputs);
      }
    }
    auto *y = static_cast<std::uint8_t *>(sum.y) +
              static_cast<std::size_t>(t * sum.hidden) * size_of(sum.y_dtype);
    kernels.from_float(sum.y_dtype, total, y, sum.hidden);
  };
  const bool alone = sum.num_tokens * sum.top_k * sum.hidden < kAloneNumbers;
  const auto region = [&](Worker &worker) {
    std::vector<float> total(static_cast<std::size_t>(whole + kPanelOutputs));
    std::vector<int> order;
    worker.share(sum.num_tokens, [&](std::int64_t t) { token(t, total.data(), order); });
  };
  runtime.pool.run(region, alone);
}

}  // namespace moeserve
