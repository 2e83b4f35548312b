// Products of rows with packed panels, for every format, over the Vec of one ISA level.
//
// gemm_tiles.h is the arithmetic, gemm_cover.h cuts a product into tiles.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "gemm_cover.h"
#include "gemm_factors.h"
#include "gemm_four_bit.h"

namespace {

// From how many rows on taking nibbles apart beforehand pays.
constexpr int kUnpackRows = 8;
// The same for multiplying them with their factors, which takes as long as four rows.
constexpr int kExpandRows = 6;

template <Format kFormat, bool kAsymmetric>
void four_bit_gemm(const GemmJob &job) {
  if (job.num_rows >= kUnpackRows) return UnpackedProduct<kFormat, kAsymmetric>::run(job);
  gemm_tiles<IntTile<kFormat, kAsymmetric>>(job);
}

void factor_gemm(const GemmJob &job) {
  if (job.num_rows >= kExpandRows) return ExpandedProduct::run(job);
  gemm_tiles<FactorTile>(job);
}

RowForm row_form(const PackedLayout &layout) {
  if (layout.format == Format::kBF16 && Vec::kHasBf16Dot) return RowForm::kBF16;
  const bool codes = layout.format == Format::kInt8 || moeserve::is_four_bit(layout.format);
  return codes && !layout.weight_only ? RowForm::kInt8 : RowForm::kF32;
}

int tile_panels(const PackedLayout &layout) {
  // Weights with factors are widened to bytes first.
  const bool as_bytes = layout.format == Format::kInt8 || layout.has_factors();
  const bool bytes = as_bytes && row_form(layout) == RowForm::kInt8;
  return bytes ? Tiles<IntTile<Format::kInt8, false>>::kManyPanels
               : Tiles<FloatTile<Format::kBF16, false>>::kManyPanels;
}

void gemm(const GemmJob &job) {
  const PackedLayout &layout = *job.layout;
  const bool integer = row_form(layout) == RowForm::kInt8;
  switch (layout.format) {
    case Format::kF32:
      return gemm_tiles<FloatTile<Format::kF32, false>>(job);
    case Format::kBF16:
      if constexpr (Vec::kHasBf16Dot) return gemm_tiles<Bf16Tile>(job);
      return gemm_tiles<FloatTile<Format::kBF16, false>>(job);
    case Format::kInt8:
      if (integer) return gemm_tiles<IntTile<Format::kInt8, false>>(job);
      return gemm_tiles<FloatTile<Format::kInt8, false>>(job);
    case Format::kInt4:
      if (integer && layout.asymmetric) return four_bit_gemm<Format::kInt4, true>(job);
      if (integer) return factor_gemm(job);
      if (layout.asymmetric) return gemm_tiles<FloatTile<Format::kInt4, true>>(job);
      return gemm_tiles<FloatTile<Format::kInt4, false>>(job);
    case Format::kMxfp4:
      if (integer) return four_bit_gemm<Format::kMxfp4, false>(job);
      return gemm_tiles<FloatTile<Format::kMxfp4, false>>(job);
    case Format::kFp8:
      return gemm_tiles<FloatTile<Format::kFp8, false>>(job);
  }
}

}  // namespace
