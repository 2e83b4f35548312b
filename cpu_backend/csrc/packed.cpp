#include "packed.h"

#include <numeric>
#include <stdexcept>
#include <string>

namespace moeserve {
namespace {

std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}

constexpr std::int64_t kLargestRows = std::int64_t{1} << 30;
// The bytes of an output's panel are counted in 32 bits up to here.
constexpr std::int64_t kLargestCols = std::int64_t{1} << 24;
// Sums of int8 products are exact in 32 bits up to here: 2^31 / (255 * 128).
constexpr std::int64_t kLargestInt8Cols = 65536;

}  // namespace

PackedLayout make_layout(Format format, std::int64_t rows, std::int64_t cols, int group_cols,
                         bool asymmetric, bool weight_only) {
  const int kind = static_cast<int>(format);
  if (kind < 0 || kind >= kNumFormats) {
    throw std::invalid_argument("format: " + std::to_string(kind) + " is none");
  }
  if (rows < 1 || cols < 1 || rows > kLargestRows || cols > kLargestCols) {
    throw std::invalid_argument("shape: [" + std::to_string(rows) + ", " + std::to_string(cols) +
                                "]; rows must be 1 to 2^30, columns 1 to 2^24");
  }
  const bool factors = format == Format::kInt4 && !asymmetric;
  if ((format == Format::kInt8 || factors) && cols > kLargestInt8Cols) {
    throw std::invalid_argument(std::string(factors ? "int4 without zero points" : "int8") + ": " +
                                std::to_string(cols) + " inputs; at most 65536");
  }
  if (format == Format::kInt4 && group_cols != 32 && group_cols != 64 && group_cols != 128) {
    throw std::invalid_argument("group: " + std::to_string(group_cols) +
                                "; int4 takes 32, 64 or 128");
  }
  if (asymmetric && format != Format::kInt4) {
    throw std::invalid_argument("asymmetric: only int4 has zero points");
  }
  PackedLayout layout = {};
  layout.format = format;
  layout.rows = static_cast<int>(rows);
  layout.cols = static_cast<int>(cols);
  layout.asymmetric = asymmetric;
  layout.weight_only = weight_only;
  std::int64_t padded = round_up(cols, chunk_inputs(format));
  switch (format) {
    case Format::kF32:
    case Format::kBF16:
      layout.group_cols = static_cast<int>(padded);
      break;
    case Format::kInt8:
      layout.group_cols = static_cast<int>(padded);
      layout.num_groups = 1;
      break;
    case Format::kInt4:
    case Format::kMxfp4:
    case Format::kFp8:
      layout.group_cols = format == Format::kInt4 ? group_cols : format == Format::kFp8 ? 128 : 32;
      padded = round_up(cols, layout.group_cols);
      layout.num_groups = static_cast<int>(padded / layout.group_cols);
      break;
  }
  layout.padded_cols = static_cast<int>(padded);
  layout.num_chunks = static_cast<int>(padded / chunk_inputs(format));
  layout.num_panels = static_cast<int>(round_up(rows, kPanelOutputs) / kPanelOutputs);
  const std::size_t groups = static_cast<std::size_t>(layout.num_groups);
  layout.scale_offset = static_cast<std::size_t>(layout.num_chunks) * kChunkBytes;
  const std::size_t scale_bytes = layout.has_float_scales() ? 4 : 2;
  layout.factor_offset = layout.scale_offset + static_cast<std::size_t>(layout.num_scales()) *
                                                   kPanelOutputs * scale_bytes;
  layout.zero_offset = layout.factor_offset + (layout.has_factors() ? groups * kPanelOutputs : 0);
  const std::size_t zeros = asymmetric ? groups * kPanelOutputs : 0;
  layout.panel_bytes = static_cast<std::size_t>(
      round_up(static_cast<std::int64_t>(layout.zero_offset + zeros), kChunkBytes));
  return layout;
}

}  // namespace moeserve
