// Packed weight matrices: the one layout that all kernels and formats share.
//
// A matrix W [N, K] (outputs by inputs) is cut into panels of 16 outputs. A panel holds all K
// inputs of its outputs, chunk after chunk of 64 bytes, so that computing 16 outputs is one
// sequential stream; then its scales, its factors, its zero points. One 64-byte chunk is
//
//   f32     [16 outputs]                 of 1 input
//   bf16    [16 outputs][2 inputs]       as the bf16 dot instructions want it
//   int8    [16 outputs][4 inputs]       codes + 128, as the int8 dot instructions want it
//   int4    [16 outputs][4 bytes]        of 8 inputs: byte b holds input b low, input 4 + b high
//   mxfp4   as int4, codes of e2m1
//   fp8     [4 inputs][16 outputs]       e4m3
//
// K is padded with weights of zero to whole chunks and whole groups, N to whole panels. A weight is
// scale * (code - zero) with one scale per output and group of inputs; the codes of mxfp4 and fp8
// stand for the values that their formats name.
//
// The scales of int4 without zero points are whole multiples of one scale per output: a weight is
// scale * factor * (code - 8), with a factor of -15 to 15 per group. Then factor * (code - 8) is an
// int8 weight, and a product is exact in integers until its end. (Two levels of scales, the finer
// one whole numbers, are those of QServe: Lin et al. 2024, arXiv:2405.04532, section 4.1. Signs and
// the choice of both by their error, encode_int4.cpp, are not.)
#pragma once

#include <cstddef>
#include <cstdint>

namespace moeserve {

// Values are those that Python passes.
enum class Format : int { kF32 = 0, kBF16 = 1, kInt8 = 2, kInt4 = 3, kMxfp4 = 4, kFp8 = 5 };
constexpr int kNumFormats = 6;

constexpr int kPanelOutputs = 16;
constexpr int kChunkBytes = 64;
constexpr int kMostFactor = 15;

constexpr bool is_float(Format f) { return f == Format::kF32 || f == Format::kBF16; }
constexpr bool is_four_bit(Format f) { return f == Format::kInt4 || f == Format::kMxfp4; }

constexpr int chunk_inputs(Format f) {
  switch (f) {
    case Format::kF32:
      return 1;
    case Format::kBF16:
      return 2;
    case Format::kInt8:
    case Format::kFp8:
      return 4;
    case Format::kInt4:
    case Format::kMxfp4:
      return 8;
  }
  return 0;
}

// Twice the values of e2m1 (OCP Microscaling Formats v1.0, section 5.3.3), code by code.
constexpr std::int8_t kDoubledFp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct PackedLayout {
  Format format;
  int rows;          // N
  int cols;          // K
  int group_cols;    // inputs under one scale; all of them where the scale is per output
  bool asymmetric;   // int4: a zero point per output and group
  bool weight_only;  // activations stay float although the codes are integers
  int padded_cols;   // a multiple of chunk and group
  int num_chunks;    // per panel
  int num_groups;    // 0 for f32 and bf16
  int num_panels;
  std::size_t scale_offset;   // in a panel; scales are [num_scales()][16]: bf16, or float
  std::size_t factor_offset;  // factors are [num_groups][16] int8
  std::size_t zero_offset;    // zero points are [num_groups][16] bytes
  std::size_t panel_bytes;    // a multiple of 64

  std::size_t bytes() const { return panel_bytes * static_cast<std::size_t>(num_panels); }
  bool has_factors() const { return format == Format::kInt4 && !asymmetric; }
  bool has_float_scales() const {
    return format == Format::kInt8 || format == Format::kFp8 || has_factors();
  }
  int num_scales() const { return has_factors() ? 1 : num_groups; }
  // Whether its panels are read by the same code, from the same kind of rows.
  bool has_panels_of(const PackedLayout &other) const {
    return format == other.format && cols == other.cols && group_cols == other.group_cols &&
           asymmetric == other.asymmetric && weight_only == other.weight_only;
  }
};

// group_cols: 32, 64 or 128 for int4; ignored for the others. Throws std::invalid_argument.
PackedLayout make_layout(Format format, std::int64_t rows, std::int64_t cols, int group_cols,
                         bool asymmetric, bool weight_only);

}  // namespace moeserve
