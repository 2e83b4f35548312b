#include "encode.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "round_small.h"

namespace moeserve {
namespace {

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
