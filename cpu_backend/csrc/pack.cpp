#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "bf16.h"
#include "encode.h"

namespace moeserve {
namespace {

void write_row(const PackedLayout &layout, std::uint8_t *panels, std::int64_t row_id,
               const EncodedRow &row) {
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
  }
  for (std::size_t g = 0; g < row.factors.size(); ++g) {
    panel[layout.factor_offset + g * kPanelOutputs + lane] =
        static_cast<std::uint8_t>(row.factors[g]);
  }
  for (std::size_t g = 0; g < row.zeros.size(); ++g) {
    panel[layout.zero_offset + g * kPanelOutputs + lane] = row.zeros[g];
  }
}

// Runs make(row index, EncodedRow) -> bool for all rows on the pool's threads and stores the
// results.
template <class Make>
bool pack_rows(Runtime &runtime, const RowTarget &target, const Make &make) {
  constexpr std::int64_t kRowsPerItem = 16;
  std::atomic<bool> good{true};
  const std::int64_t items = (target.count + kRowsPerItem - 1) / kRowsPerItem;
  runtime.pool.run([&](Worker &worker) {
    EncodedRow row(*target.layout);
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
  return pack_rows(runtime, target, [&](std::int64_t i, EncodedRow &row) {
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
  return pack_rows(runtime, target, [&](std::int64_t i, EncodedRow &row) {
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
  return pack_rows(runtime, target, [&](std::int64_t i, EncodedRow &row) {
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
      if (layout.has_factors()) {
        std::memcpy(&scale, panel + layout.scale_offset + 4 * lane, 4);
        scale *= static_cast<std::int8_t>(panel[layout.factor_offset + at]);
      } else if (layout.has_float_scales()) {
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
