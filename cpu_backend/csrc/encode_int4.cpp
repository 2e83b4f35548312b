// int4: codes, and the scales, factors and zero points that they are multiplied with.
#include <algorithm>
#include <cmath>

#include "bf16.h"
#include "encode.h"
#include "round_small.h"

namespace moeserve {
namespace {

constexpr int kMostGroupCols = 128;
// A row whose largest number is below this is one of zeros: the inverse of its scale might
// overflow.
constexpr float kSmallest = 0x1p-120f;

float clamped_code(float x, float low, float high) {
  return round_small(std::min(std::max(x, low), high));
}

// What a group's numbers x and their codes d have in common, for codes that a scale gives:
// d = x / scale, rounded and clamped. The best scale for given codes is dx / dd, by least squares,
// and the squared error that it leaves is smaller by dx^2 / dd than the sum of x^2.
struct Match {
  float dx;
  float dd;

  float gain() const { return dd == 0.0f ? 0.0f : dx * dx / dd; }
};

// Sums and extremes side by side, so that the compiler may use vectors; groups are multiples of it.
constexpr int kLanes = 16;

Match match_codes(const float *numbers, int count, float inverse, float least, float most) {
  float dx[kLanes] = {}, dd[kLanes] = {};
  for (int i = 0; i < count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float x = numbers[i + j];
      const float d = clamped_code(x * inverse, least, most);
      dx[j] += d * x;
      dd[j] += d * d;
    }
  }
  Match sums = {};
  for (int j = 0; j < kLanes; ++j) sums = {sums.dx + dx[j], sums.dd + dd[j]};
  return sums;
}

struct Span {
  float low;
  float high;
};

// The least and the greatest number, zero among them.
Span span_of(const float *numbers, int count) {
  float low[kLanes] = {}, high[kLanes] = {};
  for (int i = 0; i < count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      low[j] = std::min(low[j], numbers[i + j]);
      high[j] = std::max(high[j], numbers[i + j]);
    }
  }
  Span span = {};
  for (int j = 0; j < kLanes; ++j) {
    span = {std::min(span.low, low[j]), std::max(span.high, high[j])};
  }
  return span;
}

// Codes that reach the ends of a group waste most of their resolution on the few numbers there:
// clipping those is the smaller error. So a few scales are tried, relative to the one that reaches
// the ends (the first, which keeps what codes can hit exactly), and the best of them is corrected
// by least squares.
constexpr float kScalesTried[] = {1.0f, 0.92f, 0.84f};

// For codes from -zero to 15 - zero; 0 where nothing but zeros comes of it.
float best_scale(const float *units, int count, float reach, float zero) {
  Match best = {};
  for (const float factor : kScalesTried) {
    const Match match = match_codes(units, count, 1.0f / (reach * factor), -zero, 15.0f - zero);
    if (match.gain() > best.gain()) best = match;
  }
  return best.dd == 0.0f ? 0.0f : best.dx / best.dd;
}

// The nearest codes of `count` numbers. Byte b of a chunk's four: input b in its low half, input 4
// + b in its high half.
void write_codes(const float *numbers, int count, float inverse, float zero, std::uint8_t *bytes) {
  std::int32_t codes[kMostGroupCols];
  for (int i = 0; i < count; ++i) {
    codes[i] = static_cast<std::int32_t>(clamped_code(numbers[i] * inverse + zero, 0.0f, 15.0f));
  }
  for (int i = 0; i < count; i += 8) {
    for (int b = 0; b < 4; ++b) {
      bytes[i / 2 + b] = static_cast<std::uint8_t>(codes[i + b] | (codes[i + 4 + b] << 4));
    }
  }
}

float largest(const std::vector<float> &numbers) {
  float bound = 0.0f;
  for (const float x : numbers) bound = std::max(bound, std::fabs(x));
  return bound;
}

// A scale and a zero point per group: codes 0..15 span its numbers and zero.
void quantize_with_zeros(const PackedLayout &layout, EncodedRow &row) {
  const int count = layout.group_cols;
  for (int g = 0; g < layout.num_groups; ++g) {
    const float *numbers = row.numbers.data() + g * count;
    const auto [low, high] = span_of(numbers, count);
    const float bound = std::max(high, -low);
    float scale = 0.0f, zero = 0.0f;
    if (bound >= kSmallest) {
      // Sums of squares of numbers up to 1 neither overflow nor vanish.
      float units[kMostGroupCols];
      const float shrink = 1.0f / bound;
      for (int i = 0; i < count; ++i) units[i] = numbers[i] * shrink;
      const float reach = (high * shrink - low * shrink) / 15.0f;
      zero = clamped_code(-low * shrink / reach, 0.0f, 15.0f);
      // Rounded to bf16 before codes are chosen, so that rounding costs no accuracy of its own.
      scale = from_bf16(to_bf16(best_scale(units, count, reach, zero) * bound));
    }
    row.scales[static_cast<std::size_t>(g)] = scale;
    row.zeros[static_cast<std::size_t>(g)] = static_cast<std::uint8_t>(zero);
    write_codes(numbers, count, scale == 0.0f ? 0.0f : 1.0f / scale, zero,
                row.bytes.data() + g * count / 2);
  }
}

constexpr float kZero = 8.0f;  // the code

// The scale of a group by itself: the number that is largest in magnitude is -8, the end that
// reaches further. So it has a sign.
float own_scale(const float *units, int count) {
  const auto [low, high] = span_of(units, count);
  const float reach = (-low > high ? low : high) / -kZero;
  return std::fabs(reach) < kSmallest ? 0.0f : best_scale(units, count, reach, kZero);
}

struct Factor {
  float value;
  Match match;
};

// Of the whole numbers beside `wanted`, and one more, that with the least error: it need not be the
// nearest, since errors of numbers that are clipped grow faster than those of rounding.
Factor best_factor(const float *units, int count, float scale, float wanted) {
  const float sign = wanted < 0.0f ? -1.0f : 1.0f;
  const float least = std::floor(std::fabs(wanted));
  Factor best = {1.0f, {}};
  float most = 0.0f;
  for (int step = 0; step < 3; ++step) {
    const float value =
        sign * std::clamp(least + static_cast<float>(step), 1.0f, static_cast<float>(kMostFactor));
    const float own = scale * value;
    const Match match = match_codes(units, count, 1.0f / own, -kZero, 15.0f - kZero);
    const float gain = own * (2.0f * match.dx - own * match.dd);  // of squared error
    if (gain > most) {
      most = gain;
      best = {value, match};
    }
  }
  return best;
}

// The group that wants the largest scale has the largest factor; all others follow. The scale is
// then corrected by least squares over all of the row's codes.
void quantize_with_factors(const PackedLayout &layout, EncodedRow &row) {
  const int count = layout.group_cols;
  const float bound = largest(row.numbers);
  const float shrink = bound < kSmallest ? 0.0f : 1.0f / bound;
  for (float &x : row.numbers) x *= shrink;
  const float *units = row.numbers.data();
  std::vector<float> wanted(static_cast<std::size_t>(layout.num_groups));
  for (int g = 0; g < layout.num_groups; ++g) {
    wanted[static_cast<std::size_t>(g)] = own_scale(units + g * count, count);
  }
  const float scale = largest(wanted) / static_cast<float>(kMostFactor);
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  Match sums = {};
  for (std::size_t g = 0; g < wanted.size(); ++g) {
    const float *own = units + static_cast<int>(g) * count;
    const auto [factor, match] = best_factor(own, count, scale, wanted[g] * inverse);
    sums = {sums.dx + factor * match.dx, sums.dd + factor * factor * match.dd};
    row.factors[g] = static_cast<std::int8_t>(factor);
    write_codes(own, count, inverse / factor, kZero,
                row.bytes.data() + static_cast<int>(g) * count / 2);
  }
  row.scales[0] = sums.dd == 0.0f ? 0.0f : sums.dx / sums.dd * bound;
}

}  // namespace

void quantize_int4(const PackedLayout &layout, EncodedRow &row) {
  if (layout.has_factors()) return quantize_with_factors(layout, row);
  quantize_with_zeros(layout, row);
}

}  // namespace moeserve
