// Random numbers, activations and packed weights for the fuzz driver.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "pack.h"

namespace fuzz {

using namespace moeserve;

inline std::mt19937_64 random_bits;

inline int pick(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random_bits);
}
inline bool chance(double p) { return std::bernoulli_distribution(p)(random_bits); }
inline float normal() { return std::normal_distribution<float>()(random_bits); }

// A block of exactly `count` numbers; std::vector would keep room behind them.
template <class T>
class Block {
 public:
  explicit Block(std::size_t count) : data_(new T[count]()), count_(count) {}
  T *data() { return data_.get(); }
  const T *data() const { return data_.get(); }
  T &operator[](std::size_t i) { return data_[i]; }
  const T &operator[](std::size_t i) const { return data_[i]; }
  std::size_t size() const { return count_; }

 private:
  std::unique_ptr<T[]> data_;
  std::size_t count_;
};

inline std::string context;  // what this round does, for the message

[[noreturn]] inline void fail(const std::string &problem) {
  std::fprintf(stderr, "FAILED: %s\n%s\n", context.c_str(), problem.c_str());
  std::exit(1);
}

inline void check(double got, double expected, double bound, const std::string &where) {
  if (std::fabs(got - expected) <= bound) return;
  fail(where + ": " + std::to_string(got) + ", expected " + std::to_string(expected) +
       ", allowed difference " + std::to_string(bound));
}

// -- numbers of every type ------------------------------------------------------------------------

inline std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_bf16(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline double from_half(std::uint16_t half) {
  const int exponent = (half >> 10) & 31, fraction = half & 1023;
  const double sign = half & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return sign * (fraction ? NAN : INFINITY);
  return sign *
         (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

// Rows of numbers of one type, `stride` apart, nothing behind the last one.
struct Numbers {
  Numbers(Dtype dtype, int rows, int cols)
      : dtype(dtype),
        rows(rows),
        cols(cols),
        stride(cols + (chance(0.3) ? pick(1, 9) : 0)),
        bytes(rows == 0 ? 0 : ((rows - 1) * stride + cols) * size_of(dtype)) {}

  static Numbers random(int rows, int cols) {
    Numbers numbers(static_cast<Dtype>(pick(0, 2)), rows, cols);
    const float magnitude = std::ldexp(1.0f, pick(-6, 3));
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < cols; ++c) numbers.set(r, c, magnitude * normal());
    }
    return numbers;
  }

  void set(int row, int col, float x) {
    // Half precision by cutting off: which number it is does not matter, it is read back.
    if (dtype == Dtype::kF32) std::memcpy(at(row, col), &x, 4);
    std::uint16_t half = to_bf16(x);
    if (dtype == Dtype::kF16) {
      const float clipped = std::clamp(x, -60000.0f, 60000.0f);
      half = std::fabs(clipped) < 1e-4f ? 0 : half_of(clipped);
    }
    if (dtype != Dtype::kF32) std::memcpy(at(row, col), &half, 2);
  }
  double get(int row, int col) const {
    const std::uint8_t *p = bytes.data() + index(row, col);
    if (dtype == Dtype::kF32) {
      float x;
      std::memcpy(&x, p, 4);
      return x;
    }
    std::uint16_t half;
    std::memcpy(&half, p, 2);
    return dtype == Dtype::kBF16 ? from_bf16(half) : from_half(half);
  }
  // Any bits at all in one row.
  void spoil(int row) {
    for (std::size_t i = index(row, 0); i < index(row, cols - 1) + size_of(dtype); ++i) {
      bytes[i] = static_cast<std::uint8_t>(pick(0, 255));
    }
  }

  Dtype dtype;
  int rows, cols, stride;
  Block<std::uint8_t> bytes;

 private:
  static std::uint16_t half_of(float x) {
    int exponent;
    const float fraction = std::frexp(std::fabs(x), &exponent);  // 0.5 to 1
    const int bits = static_cast<int>(fraction * 2048.0f) - 1024;
    return static_cast<std::uint16_t>((x < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | bits);
  }
  std::size_t index(int row, int col) const {
    return (static_cast<std::size_t>(row) * static_cast<std::size_t>(stride) +
            static_cast<std::size_t>(col)) *
           size_of(dtype);
  }
  std::uint8_t *at(int row, int col) { return bytes.data() + index(row, col); }
};

// -- weights --------------------------------------------------------------------------------------

struct Kind {
  Format format;
  int group_cols;
  bool asymmetric;
  bool weight_only;
};

inline Kind random_kind() {
  const auto format = static_cast<Format>(pick(0, kNumFormats - 1));
  const bool int4 = format == Format::kInt4;
  return {format, 32 << pick(0, 2), int4 && chance(0.5), chance(0.4)};
}

inline int usable_cols(const Kind &kind, int cols) {
  return kind.format == Format::kMxfp4 ? (cols + 31) / 32 * 32 : cols;
}

inline PackedLayout layout_of(const Kind &kind, int rows, int cols) {
  return make_layout(kind.format, rows, cols, kind.group_cols, kind.asymmetric, kind.weight_only);
}

// Fills the rows `ids` with random weights, in pieces.
inline void pack_random(Runtime &runtime, const PackedLayout &layout, std::uint8_t *panels,
                        std::vector<std::int64_t> ids) {
  std::shuffle(ids.begin(), ids.end(), random_bits);
  const int cols = layout.cols;
  for (std::size_t first = 0; first < ids.size();) {
    const auto count =
        std::min<std::size_t>(ids.size() - first, static_cast<std::size_t>(pick(1, 40)));
    const RowTarget target = {&layout, panels, ids.data() + first,
                              static_cast<std::int64_t>(count)};
    const int rows = static_cast<int>(count);
    bool good = true;
    if (layout.format == Format::kMxfp4 || layout.format == Format::kFp8) {
      const bool fp8 = layout.format == Format::kFp8;
      const int code_cols = fp8 ? cols : cols / 2;
      const int groups = layout.num_groups;
      Block<std::uint8_t> codes(count * static_cast<std::size_t>(code_cols));
      for (std::size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<std::uint8_t>(pick(0, 255));
        if (fp8 && (codes[i] & 0x7f) > 0x50) codes[i] &= 0x8f;  // no NaN, nothing huge
      }
      if (fp8) {
        Block<float> scales(count * static_cast<std::size_t>(groups));
        for (std::size_t i = 0; i < scales.size(); ++i) scales[i] = 0.1f + std::fabs(normal());
        good = pack_fp8(runtime, target, codes.data(), code_cols, scales.data(), groups);
      } else {
        Block<std::uint8_t> scales(count * static_cast<std::size_t>(groups));
        for (std::size_t i = 0; i < scales.size(); ++i) {
          scales[i] = static_cast<std::uint8_t>(pick(120, 128));
        }
        good = pack_mxfp4(runtime, target, codes.data(), code_cols, scales.data(), groups);
      }
    } else {
      const Numbers source = Numbers::random(rows, cols);
      good = pack_numbers(runtime, target, source.dtype, source.bytes.data(), source.stride);
    }
    if (!good) fail("finite weights were refused");
    first += count;
  }
}

inline std::vector<std::int64_t> first_ids(int count) {
  std::vector<std::int64_t> ids(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) ids[static_cast<std::size_t>(i)] = i;
  return ids;
}

// [rows][cols] of the numbers that the packed rows `ids` stand for.
inline std::vector<std::vector<double>> unpack(const PackedLayout &layout,
                                               const std::uint8_t *panels,
                                               const std::vector<std::int64_t> &ids) {
  std::vector<std::vector<double>> all;
  Block<float> row(static_cast<std::size_t>(layout.cols));
  for (const std::int64_t id : ids) {
    unpack_row(layout, panels, id, row.data());
    all.emplace_back(row.data(), row.data() + layout.cols);
  }
  return all;
}

}  // namespace fuzz
