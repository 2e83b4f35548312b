#include "likely_absent.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace moeserve {

std::vector<LikelyAbsent> likely_absent(const float *chances, const bool *absent,
                                        const std::vector<std::int64_t> &sizes) {
  std::vector<LikelyAbsent> found;
  std::vector<std::int64_t> order;
  for (std::size_t layer = 0; layer < sizes.size(); ++layer) {
    const std::int64_t size = sizes[layer];
    double total = 0.0;
    for (std::int64_t e = 0; e < size; ++e) total += static_cast<double>(chances[e]);
    const double at_random = total / static_cast<double>(size);
    order.clear();
    for (std::int64_t e = 0; e < size; ++e) {
      if (absent[e] && static_cast<double>(chances[e]) > at_random) order.push_back(e);
    }
    if (!order.empty()) {
      const auto likelier = [&](std::int64_t a, std::int64_t b) {
        return chances[a] != chances[b] ? chances[a] > chances[b] : a < b;
      };
      std::sort(order.begin(), order.end(), likelier);
      LikelyAbsent result = {static_cast<int>(layer), total, 0, order, {}};
      for (const std::int64_t e : order) result.chances.push_back(chances[e]);

      const double rounded = std::min(std::nearbyint(total), static_cast<double>(size));
      const auto num_wanted = std::max<std::int64_t>(1, static_cast<std::int64_t>(rounded));
      order.resize(static_cast<std::size_t>(size));
      for (std::int64_t e = 0; e < size; ++e) order[static_cast<std::size_t>(e)] = e;
      std::partial_sort(order.begin(), order.begin() + num_wanted, order.end(), likelier);
      for (std::int64_t i = 0; i < num_wanted; ++i) {
        result.num_absent += absent[order[static_cast<std::size_t>(i)]] ? 1 : 0;
      }
      found.push_back(std::move(result));
    }
    chances += size;
    absent += size;
  }
  return found;
}

}  // namespace moeserve
