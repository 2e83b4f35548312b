#include "predictor.h"

#include <algorithm>

namespace moeserve {

void any_row(const float *chances, std::int64_t num_rows, std::int64_t stride, int num_experts,
             float *out) {
  if (num_rows == 1) {
    std::copy_n(chances, num_experts, out);
    return;
  }
  std::fill_n(out, num_experts, 1.0f);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (int e = 0; e < num_experts; ++e) out[e] *= 1.0f - chances[row * stride + e];
  }
  for (int e = 0; e < num_experts; ++e) out[e] = 1.0f - out[e];
}

}  // namespace moeserve
