#include "encode.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bf16.h"

namespace moeserve {
namespace {

constexpr int kMostGroupCols = 128;

// To the nearest integer, halves to even, for magnitudes below 2^22: there is no such number with a
// fraction left after the addition. Unlike std::nearbyint it becomes vector code on any CPU.
float round_small(float x) {
  constexpr float kNoFraction = 0x1.8p23f;
  return (x + kNoFraction) - kNoFraction;
}

float clamped_code(float x, float low, float high) {
  return round_small(std::min(std::max(x, low), high));
}

bool all_finite(const std::vector<float> &numbers) {
  float check = 0.0f;
  for (const float x : numbers) check += x * 0.0f;  // NaN for Inf and for NaN
  return check == 0.0f;
}

// Per output: codes -127..127 stored as 1..255. The scale's inverse stays finite: see quantize_row.
void quantize_int8(EncodedRow &row) {
  float bound = 0.0f;
  for (const float x : row.numbers) bound = std::max(bound, std::fabs(x));
  const bool zero = bound < 0x1p-120f;
  row.scales[0] = zero ? 0.0f : bound / 127.0f;
  const float inverse = zero ? 0.0f : 127.0f / bound;
  for (std::size_t i = 0; i < row.numbers.size(); ++i) {
    row.bytes[i] =
        static_cast<std::uint8_t>(static_cast<int>(round_small(row.numbers[i] * inverse)) + 128);
  }
}

struct GroupCode {
  float scale;
  float zero;
};

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
// by least squares. Symmetric: the number that is largest in magnitude is -8, the end that reaches
// further. Asymmetric: codes 0..15 span the numbers and zero.
constexpr float kScalesTried[] = {1.0f, 0.92f, 0.84f};

GroupCode choose_code(const float *numbers, int count, bool asymmetric) {
  auto [low, high] = span_of(numbers, count);
  const float bound = std::max(high, -low);
  if (bound < 0x1p-120f) return {0.0f, asymmetric ? 0.0f : 8.0f};
  // Sums of squares of numbers up to 1 neither overflow nor vanish.
  float units[kMostGroupCols];
  const float shrink = 1.0f / bound;
  for (int i = 0; i < count; ++i) units[i] = numbers[i] * shrink;
  low *= shrink;
  high *= shrink;
  const float reach = asymmetric ? (high - low) / 15.0f : (-low > high ? low : high) / -8.0f;
  const float zero = asymmetric ? clamped_code(-low / reach, 0.0f, 15.0f) : 8.0f;
  Match best = {};
  for (const float factor : kScalesTried) {
    const Match match = match_codes(units, count, 1.0f / (reach * factor), -zero, 15.0f - zero);
    if (match.gain() > best.gain()) best = match;
  }
  // Rounded to bf16 before codes are chosen, so that rounding costs no accuracy of its own.
  return {from_bf16(to_bf16(best.dx / best.dd * bound)), zero};
}

void quantize_int4(const PackedLayout &layout, EncodedRow &row) {
  std::vector<float> &numbers = row.numbers;
  for (int g = 0; g < layout.num_groups; ++g) {
    const int begin = g * layout.group_cols;
    const GroupCode code =
        choose_code(numbers.data() + begin, layout.group_cols, layout.asymmetric);
    row.scales[static_cast<std::size_t>(g)] = code.scale;
    row.zeros[static_cast<std::size_t>(g)] = static_cast<std::uint8_t>(code.zero);
    const float inverse = code.scale == 0.0f ? 0.0f : 1.0f / code.scale;
    std::int32_t codes[kMostGroupCols];
    for (int i = 0; i < layout.group_cols; ++i) {
      const float number = numbers[static_cast<std::size_t>(begin + i)];
      codes[i] = static_cast<std::int32_t>(clamped_code(number * inverse + code.zero, 0.0f, 15.0f));
    }
    // Byte b of a chunk's four: input b in its low half, input 4 + b in its high half.
    std::uint8_t *bytes = row.bytes.data() + begin / 2;
    for (int i = 0; i < layout.group_cols; i += 8) {
      for (int b = 0; b < 4; ++b) {
        bytes[i / 2 + b] = static_cast<std::uint8_t>(codes[i + b] | (codes[i + 4 + b] << 4));
      }
    }
  }
}

}  // namespace

bool encode(const PackedLayout &layout, EncodedRow &row) {
  switch (layout.format) {
    case Format::kF32:
      std::memcpy(row.bytes.data(), row.numbers.data(), row.bytes.size());
      return true;
    case Format::kInt8:
      if (!all_finite(row.numbers)) return false;
      quantize_int8(row);
      return true;
    case Format::kInt4:
      if (!all_finite(row.numbers)) return false;
      quantize_int4(layout, row);
      return true;
    case Format::kBF16:
    case Format::kMxfp4:
    case Format::kFp8:
      break;
  }
  return false;
}

}  // namespace moeserve
