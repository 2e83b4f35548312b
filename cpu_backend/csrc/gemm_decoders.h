// Weights of every format as floats, for the Vec of one ISA level.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "kernels.h"

namespace {

using moeserve::chunk_inputs;
using moeserve::Format;
using moeserve::kChunkBytes;
using moeserve::kPanelOutputs;
using moeserve::PackedLayout;

// Sums live in registers only where every loop over them is unrolled.
#define MOESERVE_UNROLL _Pragma("GCC unroll 32")
#define MOESERVE_INLINE inline __attribute__((always_inline))

// One decoder for each format: `at<J>` is input J of a chunk, without its scale.
template <Format kFormat>
struct Decoder;

template <>
struct Decoder<Format::kF32> {
  explicit Decoder(const PackedLayout &) {}
  template <int J>
  MOESERVE_INLINE Vec::F at(const std::uint8_t *chunk) const {
    return Vec::load(reinterpret_cast<const float *>(chunk));
  }
};

template <>
struct Decoder<Format::kBF16> {
  explicit Decoder(const PackedLayout &) {}
  template <int J>
  MOESERVE_INLINE Vec::F at(const std::uint8_t *chunk) const {
    const auto raw = Vec::load64(chunk);
    return J == 0 ? Vec::bf16_even(raw) : Vec::bf16_odd(raw);
  }
};

template <>
struct Decoder<Format::kInt8> {
  explicit Decoder(const PackedLayout &) {}
  template <int J>
  MOESERVE_INLINE Vec::F at(const std::uint8_t *chunk) const {
    return Vec::byte_at<J>(Vec::load64(chunk), 128);
  }
};

// Codes of int4 as they are; `kSymmetricZero` or a stored zero point is taken off elsewhere.
template <>
struct Decoder<Format::kInt4> {
  explicit Decoder(const PackedLayout &layout) : table(Vec::table(values(layout.asymmetric))) {}
  template <int J>
  MOESERVE_INLINE Vec::F at(const std::uint8_t *chunk) const {
    return Vec::nibble_at<J>(Vec::load64(chunk), table);
  }
  static const float *values(bool asymmetric) {
    static constexpr float kCodes[24] = {-8, -7, -6, -5, -4, -3, -2, -1, 0,  1,  2,  3,
                                         4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15};
    return asymmetric ? kCodes + 8 : kCodes;
  }
  Vec::Table table;
};

template <>
struct Decoder<Format::kMxfp4> {
  explicit Decoder(const PackedLayout &) : table(make()) {}
  template <int J>
  MOESERVE_INLINE Vec::F at(const std::uint8_t *chunk) const {
    return Vec::nibble_at<J>(Vec::load64(chunk), table);
  }
  static Vec::Table make() {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = 0.5f * moeserve::kDoubledFp4[i];
    return Vec::table(values);
  }
  Vec::Table table;
};

template <>
struct Decoder<Format::kFp8> {
  explicit Decoder(const PackedLayout &) {}
  template <int J>
  MOESERVE_INLINE Vec::F at(const std::uint8_t *chunk) const {
    return Vec::load_e4m3_scaled(chunk + kPanelOutputs * J);
  }
};

// Factors of a group of int4 without zero points.
MOESERVE_INLINE const std::int8_t *factors_of(const PackedLayout &layout, const std::uint8_t *panel,
                                              int group) {
  return reinterpret_cast<const std::int8_t *>(panel + layout.factor_offset) +
         kPanelOutputs * group;
}

template <Format kFormat, bool kFactors = false>
MOESERVE_INLINE Vec::F load_scale(const PackedLayout &layout, const std::uint8_t *panel,
                                  int group) {
  const std::uint8_t *scales = panel + layout.scale_offset;
  if constexpr (kFactors) {
    return Vec::mul(Vec::load(reinterpret_cast<const float *>(scales)),
                    Vec::load_s8(factors_of(layout, panel, group)));
  } else if constexpr (kFormat == Format::kInt8 || kFormat == Format::kFp8) {
    return Vec::load(reinterpret_cast<const float *>(scales) + kPanelOutputs * group);
  } else {
    return Vec::load_bf16(reinterpret_cast<const std::uint16_t *>(scales) + kPanelOutputs * group);
  }
}

template <int kValue>
struct Index {
  static constexpr int value = kValue;
};

// Calls body(Index<0>{}) ... body(Index<kCount - 1>{}): a number that types can depend on.
template <int kCount, int kFrom = 0, class Body>
MOESERVE_INLINE void unroll(const Body &body) {
  if constexpr (kFrom < kCount) {
    body(Index<kFrom>{});
    unroll<kCount, kFrom + 1>(body);
  }
}

}  // namespace
