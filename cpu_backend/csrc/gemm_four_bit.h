// Four-bit codes for many rows.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "gemm_cover.h"

namespace {

// Taking nibbles apart costs as much as three rows' products, so it is done once for a block of
// inputs: by the first tile of rows, into bytes that stay in the first-level cache while the others
// pass by. The arithmetic, and with it every bit of the result, is IntTile's.
template <Format kFormat, bool kAsymmetric>
struct UnpackedProduct {
  using Tile = IntTile<kFormat, kAsymmetric>;
  static constexpr int kPanels = Tiles<Tile>::kManyPanels;
  static constexpr int kRows = Tiles<Tile>::kManyRows;
  static constexpr int kBlockInputs = 768;

  struct Block {
    const GemmJob *job;
    const std::uint8_t *panel[kPanels];
    const std::uint8_t *chunks[kPanels];  // of the block's first group
    std::uint8_t *codes[kPanels];         // [inputs / 4][16 outputs][4]
    int first_panel, num_panels;
    int first_group, num_groups;
    bool last;
  };

  static void run(const GemmJob &job) {
    alignas(64) std::uint8_t codes[kPanels][kBlockInputs * kPanelOutputs];
    const PackedLayout &layout = *job.layout;
    const int block_groups = kBlockInputs / layout.group_cols;
    const int group_chunks = layout.group_cols / chunk_inputs(kFormat);
    const std::int64_t row_tiles = (job.num_rows + kRows - 1) / kRows;
    RowsAhead rows_ahead(job, num_tiles<kRows, kPanels>(job));
    for (int first = 0; first < job.num_panels; first += kPanels) {
      const int panels = job.num_panels - first < kPanels ? job.num_panels - first : kPanels;
      PanelsAhead ahead = ahead_of(job, first, panels, row_tiles * layout.num_groups);
      for (int g = 0; g < layout.num_groups; g += block_groups) {
        Block block = {};
        block.job = &job;
        block.first_panel = first;
        block.num_panels = panels;
        block.first_group = g;
        block.num_groups =
            layout.num_groups - g < block_groups ? layout.num_groups - g : block_groups;
        block.last = g + block.num_groups == layout.num_groups;
        for (int p = 0; p < panels; ++p) {
          block.panel[p] = job.panels + (first + p) * layout.panel_bytes;
          block.codes[p] = codes[p];
          block.chunks[p] = block.panel[p] + g * group_chunks * kChunkBytes;
        }
        if (panels == kPanels) {
          cover<kPanels>(block, ahead, rows_ahead);
        } else {
          cover<1>(block, ahead, rows_ahead);
        }
      }
    }
  }

 private:
  template <int P>
  static void cover(const Block &block, PanelsAhead &ahead, RowsAhead &rows_ahead) {
    for_row_tiles<kRows, P>(
        block.job->num_rows, [&](auto rows, int row) __attribute__((always_inline)) {
          rows_ahead.step();
          constexpr int kR = decltype(rows)::value;
          row == 0 ? tile<kR, P, true>(block, row, ahead) : tile<kR, P, false>(block, row, ahead);
        });
  }

  // Codes of chunk c. kFirst: they are taken apart here, and kept for the tiles that follow.
  template <bool kFirst>
  MOESERVE_INLINE static void load_codes(const Block &block, int p, int c, Vec::I &low,
                                         Vec::I &high) {
    std::uint8_t *codes = block.codes[p] + 2 * c * kChunkBytes;
    if constexpr (kFirst) {
      Tile::take_apart(Vec::load64(block.chunks[p] + c * kChunkBytes), low, high);
      Vec::store64(codes, low);
      Vec::store64(codes + kChunkBytes, high);
    } else {
      low = Vec::load64(codes);
      high = Vec::load64(codes + kChunkBytes);
    }
  }

  template <int R, int P, bool kFirst>
  static void tile(const Block &block, int first_row, PanelsAhead &all_ahead) {
    const GemmJob &job = *block.job;
    const PackedLayout &layout = *job.layout;
    const int group_chunks = layout.group_cols / chunk_inputs(kFormat);
    const Place place = {job, first_row, block.first_panel, all_ahead};
    const std::int8_t *x[R];
    const std::int32_t *sums[R];
    Vec::F total[R][P];
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
      x[r] = place.x<std::int8_t>(r) + block.first_group * layout.group_cols;
      sums[r] = place.sums(r) + block.first_group;
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
        total[r][p] = block.first_group == 0 ? Vec::zero() : Vec::load(place.out(r, p));
      }
    }
    PanelsAhead ahead = all_ahead;
    for (int g = 0; g < block.num_groups; ++g) {
      Vec::I acc[R][P];
      ahead.template step<P>();
      Tile::template start_group<R, P>(layout, block.panel, block.first_group + g, sums, g, acc);
      // In runs of 32 inputs, the smallest group.
      for (int c = g * group_chunks; c < (g + 1) * group_chunks; c += 4) {
        MOESERVE_UNROLL for (int j = 0; j < 4; ++j) {
          Vec::I low[P], high[P];
          MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
            load_codes<kFirst>(block, p, c + j, low[p], high[p]);
          }
          Tile::template add_products<R, P>(low, x, 8 * (c + j), acc);
          Tile::template add_products<R, P>(high, x, 8 * (c + j) + 4, acc);
        }
      }
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
        const Vec::F scale = load_scale<kFormat>(layout, block.panel[p], block.first_group + g);
        MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
          total[r][p] = Vec::fma(Vec::to_float(acc[r][p]), scale, total[r][p]);
        }
      }
    }
    all_ahead = ahead;
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
      const Vec::F scale = Vec::set1(block.last ? Tile::row_scale(job, place.source(r)) : 1.0f);
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
        Vec::store(place.out(r, p), Vec::mul(total[r][p], scale));
      }
    }
  }
};

}  // namespace
