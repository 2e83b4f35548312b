// Numbers to the codes, scales and zero points that a packed format keeps of them.
#pragma once

#include <cstdint>
#include <vector>

#include "packed.h"

namespace moeserve {

// One row on its way into a panel: its four bytes of every chunk, its scales, factors, zero points.
// numbers: what is encoded, [padded_cols], zeros behind the last column.
struct EncodedRow {
  explicit EncodedRow(const PackedLayout &layout)
      : numbers(static_cast<std::size_t>(layout.padded_cols)),
        bytes(static_cast<std::size_t>(layout.num_chunks) * 4),
        scales(static_cast<std::size_t>(layout.num_scales())),
        factors(static_cast<std::size_t>(layout.has_factors() ? layout.num_groups : 0)),
        zeros(static_cast<std::size_t>(layout.asymmetric ? layout.num_groups : 0)) {}

  std::vector<float> numbers;
  std::vector<std::uint8_t> bytes;
  std::vector<float> scales;
  std::vector<std::int8_t> factors;
  std::vector<std::uint8_t> zeros;
};

// Fills all else of `row` from row.numbers, for f32, int8 and int4. Returns false where a number
// that must be quantised is NaN or Inf.
bool encode(const PackedLayout &layout, EncodedRow &row);

// The part of int4, for finite numbers.
void quantize_int4(const PackedLayout &layout, EncodedRow &row);

}  // namespace moeserve
