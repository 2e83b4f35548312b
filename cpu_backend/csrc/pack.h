// Filling packed matrices, and reading them back.
#pragma once

#include <cstdint>

#include "packed.h"
#include "runtime.h"

namespace moeserve {

// Source rows i = 0..count-1 become rows row_ids[i] of the packed matrix. All row ids must be
// within the layout's rows padded to whole panels, and distinct.
struct RowTarget {
  const PackedLayout *layout;
  std::uint8_t *panels;
  const std::int64_t *row_ids;
  std::int64_t count;
};

// Rows of numbers, quantised as the format wants. Returns false where a weight that must be
// quantised is NaN or Inf. F32 and BF16 take any value. Not for mxfp4 and fp8.
bool pack_numbers(Runtime &runtime, const RowTarget &target, Dtype dtype, const void *source,
                  std::int64_t row_stride);

// Codes of mxfp4 as checkpoints hold them: [count, K / 2] bytes, the lower half first; scales
// [count, K / 32] e8m0. Returns false where a scale is NaN (255).
bool pack_mxfp4(Runtime &runtime, const RowTarget &target, const std::uint8_t *codes,
                std::int64_t code_stride, const std::uint8_t *scales, std::int64_t scale_stride);

// Codes of e4m3 [count, K]; scales [count, ceil(K / 128)]. Returns false where one of them is NaN.
bool pack_fp8(Runtime &runtime, const RowTarget &target, const std::uint8_t *codes,
              std::int64_t code_stride, const float *scales, std::int64_t scale_stride);

// The numbers that row `row` stands for: out [K].
void unpack_row(const PackedLayout &layout, const std::uint8_t *panels, std::int64_t row,
                float *out);

}  // namespace moeserve
