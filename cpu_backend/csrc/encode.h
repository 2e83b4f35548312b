// Numbers to the codes, scales and zero points that a packed format keeps of them.
#pragma once

#include <cstdint>
#include <vector>

#include "packed.h"

namespace moeserve {

// One row on its way into a panel: its four bytes of every chunk, its scales and zero points.
// numbers: what is encoded, [padded_cols], zeros behind the last column.
struct EncodedRow {
  explicit EncodedRow(const PackedLayout &layout)
      : numbers(static_cast<std::size_t>(layout.padded_cols)),
        bytes(static_cast<std::size_t>(layout.num_chunks) * 4),
        scales(static_cast<std::size_t>(layout.num_groups)),
        zeros(static_cast<std::size_t>(layout.num_groups)) {}

  std::vector<float> numbers;
  std::vector<std::uint8_t> bytes;
  std::vector<float> scales;
  std::vector<std::uint8_t> zeros;
};

// Fills row.bytes, row.scales and row.zeros from row.numbers, for f32, int8 and int4. Returns false
// where a number that must be quantised is NaN or Inf.
bool encode(const PackedLayout &layout, EncodedRow &row);

}  // namespace moeserve
