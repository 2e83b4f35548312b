// Cosine and sine by which rotary embeddings turn the positions of a step.
#pragma once

#include <cmath>
#include <cstdint>

namespace moeserve {

// frequencies: radians per position of the dim / 2 pairs of a row; `stride` numbers to those of the
// next row, 0 where all rows have the same. cosine, sine: [num_rows, dim], the halves alike but for
// the sign of sine, which is negative in the first. Angles are float32 products; their cosines are
// taken in double and rounded, so that their last bits are those of any good library.
inline void make_turns(const std::int64_t *positions, std::int64_t num_rows,
                       const float *frequencies, std::int64_t stride, std::int64_t dim,
                       float amplitude, float *cosine, float *sine) {
  const std::int64_t half = dim / 2;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const auto position = static_cast<float>(positions[row]);
    float *c = cosine + row * dim, *s = sine + row * dim;
    for (std::int64_t i = 0; i < half; ++i) {
      const double angle = position * frequencies[row * stride + i];
      c[i] = c[i + half] = static_cast<float>(std::cos(angle)) * amplitude;
      s[i + half] = static_cast<float>(std::sin(angle)) * amplitude;
      s[i] = -s[i + half];
    }
  }
}

}  // namespace moeserve
