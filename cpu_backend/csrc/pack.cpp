#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace moeserve {
namespace {

std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

constexpr int kMostGroupCols = 128;

float from_bf16(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// One row on its way into a panel: its four bytes of every chunk, its scales and zero points.
struct PackedRow {
  explicit PackedRow(const PackedLayout &layout)
      : numbers(static_cast<std::size_t>(layout.padded_cols)),
        bytes(static_cast<std::size_t>(layout.num_chunks) * 4),
        scales(static_cast<std::size_t>(layout.num_groups)),
        zeros(static_cast<std::size_t>(layout.num_groups)) {}

  std::vector<float> numbers;
  std::vector<std::uint8_t> bytes;
  std::vector<float> scales;
  std::vector<std::uint8_t> zeros;
};

void write_row(const PackedLayout &layout, std::uint8_t *panels, std::int64_t row_id,
               const PackedRow &row) {
  std::uint8_t *panel =
      panels + static_cast<std::size_t>(row_id / kPanelOutputs) * layout.panel_bytes;
  const auto lane = static_cast<std::size_t>(row_id % kPanelOutputs);
  const std::uint8_t *bytes = row.bytes.data();
  for (int c = 0; c < layout.num_chunks; ++c) {
    std::uint8_t *chunk = panel + static_cast<std::size_t>(c) * kChunkBytes;
    if (layout.format == Format::kFp8) {
      for (int j = 0; j < 4; ++j) chunk[j * kPanelOutputs + lane] = bytes[4 * c + j];
    } else {
      std::memcpy(chunk + 4 * lane, bytes + 4 * c, 4);
    }
  }
  for (std::size_t g = 0; g < row.scales.size(); ++g) {
    const std::size_t at = g * kPanelOutputs + lane;
    if (layout.has_float_scales()) {
      std::memcpy(panel + layout.scale_offset + 4 * at, &row.scales[g], 4);
    } else {
      const std::uint16_t half = to_bf16(row.scales[g]);
      std::memcpy(panel + layout.scale_offset + 2 * at, &half, 2);
    }
    if (layout.asymmetric) panel[layout.zero_offset + at] = row.zeros[g];
  }
}

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
void quantize_int8(PackedRow &row) {
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

void quantize_int4(const PackedLayout &layout, PackedRow &row) {
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

// Fills row.bytes and row.scales from row.numbers. False: a number is not finite.
bool encode(const PackedLayout &layout, PackedRow &row) {
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

// Runs make(row index, PackedRow) -> bool for all rows on the pool's threads and stores the
// results.
template <class Make>
bool pack_rows(Runtime &runtime, const RowTarget &target, const Make &make) {
  constexpr std::int64_t kRowsPerItem = 16;
  std::atomic<bool> good{true};
  const std::int64_t items = (target.count + kRowsPerItem - 1) / kRowsPerItem;
  runtime.pool.run([&](Worker &worker) {
    PackedRow row(*target.layout);
    worker.share(items, [&](std::int64_t item) {
      const std::int64_t end = std::min(target.count, (item + 1) * kRowsPerItem);
      for (std::int64_t i = item * kRowsPerItem; i < end; ++i) {
        if (!make(i, row)) good.store(false, std::memory_order_relaxed);
        write_row(*target.layout, target.panels, target.row_ids[i], row);
      }
    });
  });
  return good.load();
}

}  // namespace

bool pack_numbers(Runtime &runtime, const RowTarget &target, Dtype dtype, const void *source,
                  std::int64_t row_stride) {
  const PackedLayout &layout = *target.layout;
  const auto cols = static_cast<std::size_t>(layout.cols);
  const auto row_bytes = static_cast<std::int64_t>(size_of(dtype)) * row_stride;
  const auto *bytes = static_cast<const std::uint8_t *>(source);
  return pack_rows(runtime, target, [&](std::int64_t i, PackedRow &row) {
    const void *from = bytes + i * row_bytes;
    if (layout.format == Format::kBF16) {
      if (dtype == Dtype::kBF16) {
        std::memcpy(row.bytes.data(), from, 2 * cols);
      } else {
        runtime.kernels.to_float(dtype, from, row.numbers.data(), layout.cols);
        runtime.kernels.from_float(Dtype::kBF16, row.numbers.data(), row.bytes.data(), layout.cols);
      }
      return true;
    }
    runtime.kernels.to_float(dtype, from, row.numbers.data(), layout.cols);
    return encode(layout, row);
  });
}

bool pack_mxfp4(Runtime &runtime, const RowTarget &target, const std::uint8_t *codes,
                std::int64_t code_stride, const std::uint8_t *scales, std::int64_t scale_stride) {
  const PackedLayout &layout = *target.layout;
  return pack_rows(runtime, target, [&](std::int64_t i, PackedRow &row) {
    const std::uint8_t *from = codes + i * code_stride;
    std::fill(row.bytes.begin(), row.bytes.end(), std::uint8_t{0});
    for (int k = 0; k < layout.cols; ++k) {
      const int value = k % 2 == 0 ? from[k / 2] & 15 : from[k / 2] >> 4;
      auto &byte = row.bytes[static_cast<std::size_t>(k / 8 * 4 + k % 4)];
      byte = static_cast<std::uint8_t>(byte | (k % 8 < 4 ? value : value << 4));
    }
    bool good = true;
    for (int g = 0; g < layout.num_groups; ++g) {
      const std::uint8_t exponent = scales[i * scale_stride + g];
      good = good && exponent != 255;
      row.scales[static_cast<std::size_t>(g)] = std::ldexp(1.0f, exponent - 127);
    }
    return good;
  });
}

bool pack_fp8(Runtime &runtime, const RowTarget &target, const std::uint8_t *codes,
              std::int64_t code_stride, const float *scales, std::int64_t scale_stride) {
  const PackedLayout &layout = *target.layout;
  return pack_rows(runtime, target, [&](std::int64_t i, PackedRow &row) {
    const std::uint8_t *from = codes + i * code_stride;
    bool good = true;
    for (int k = 0; k < layout.cols; ++k) good = good && (from[k] & 0x7f) != 0x7f;
    std::memcpy(row.bytes.data(), from, static_cast<std::size_t>(layout.cols));
    for (int g = 0; g < layout.num_groups; ++g) {
      // Kernels read e4m3 as float16, which is 2^-8 of its value.
      const float scale = scales[i * scale_stride + g] * 256.0f;
      good = good && std::isfinite(scale);
      row.scales[static_cast<std::size_t>(g)] = scale;
    }
    return good;
  });
}

void unpack_row(const PackedLayout &layout, const std::uint8_t *panels, std::int64_t row,
                float *out) {
  const std::uint8_t *panel =
      panels + static_cast<std::size_t>(row / kPanelOutputs) * layout.panel_bytes;
  const auto lane = static_cast<std::size_t>(row % kPanelOutputs);
  for (int k = 0; k < layout.cols; ++k) {
    const int inputs = chunk_inputs(layout.format);
    const std::uint8_t *chunk = panel + static_cast<std::size_t>(k / inputs) * kChunkBytes;
    const std::uint8_t *own = chunk + 4 * lane;
    const int j = k % inputs;
    float scale = 1.0f;
    int zero = 8;
    if (layout.num_groups > 0) {
      const std::size_t at = static_cast<std::size_t>(k / layout.group_cols) * kPanelOutputs + lane;
      if (layout.has_float_scales()) {
        std::memcpy(&scale, panel + layout.scale_offset + 4 * at, 4);
      } else {
        std::uint16_t half;
        std::memcpy(&half, panel + layout.scale_offset + 2 * at, 2);
        scale = from_bf16(half);
      }
      if (layout.asymmetric) zero = panel[layout.zero_offset + at];
    }
    switch (layout.format) {
      case Format::kF32:
        std::memcpy(out + k, own, 4);
        break;
      case Format::kBF16: {
        std::uint16_t half;
        std::memcpy(&half, own + 2 * j, 2);
        out[k] = from_bf16(half);
        break;
      }
      case Format::kInt8:
        out[k] = scale * static_cast<float>(own[j] - 128);
        break;
      case Format::kInt4:
      case Format::kMxfp4: {
        const int code = j < 4 ? own[j] & 15 : own[j - 4] >> 4;
        const float value = layout.format == Format::kInt4 ? static_cast<float>(code - zero)
                                                           : 0.5f * kDoubledFp4[code];
        out[k] = scale * value;
        break;
      }
      case Format::kFp8: {
        const unsigned code = chunk[j * kPanelOutputs + lane];
        const int exponent = static_cast<int>((code >> 3) & 15u);
        const float fraction = static_cast<float>(code & 7u) / 8.0f;
        const float magnitude =
            exponent == 0 ? std::ldexp(fraction, -6) : std::ldexp(1.0f + fraction, exponent - 7);
        out[k] = scale / 256.0f * (code & 0x80u ? -magnitude : magnitude);
        break;
      }
    }
  }
}

}  // namespace moeserve
