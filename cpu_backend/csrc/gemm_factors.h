// int4 whose groups have whole factors (packed.h): products that are exact in integers to the end
// of a row, and so the same by either of two ways.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "gemm_cover.h"

namespace {

using moeserve::kRunInputs;
constexpr int kRunChunks = kRunInputs / chunk_inputs(Format::kInt4);

// Exact sums to results in `out`: the output's scale, the row's scale, as for int8.
template <int R, int P>
MOESERVE_INLINE void store_results(const Place &place, const Vec::I (&sum)[R][P],
                                   float *const (&out)[R]) {
  Vec::F scale[P];
  MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
    const std::uint8_t *scales = place.panel(p) + place.job.layout->scale_offset;
    scale[p] = Vec::load(reinterpret_cast<const float *>(scales));
  }
  MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
    const Vec::F own = Vec::set1(place.job.rows.scales[place.source(r)]);
    MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
      const Vec::F product = Vec::mul(Vec::to_float(sum[r][p]), scale[p]);
      Vec::store(out[r] + p * kPanelOutputs, Vec::mul(product, own));
    }
  }
}

// Few rows: codes times rows over a run of inputs, whose sum fits 16 bits, times its factor.
struct FactorTile {
  static constexpr bool kGrouped = true;
  static constexpr bool kBytes = false;
  using Codes = IntTile<Format::kInt4, true>;

  template <int R, int P>
  static void run(const Place &place) {
    const PackedLayout &layout = *place.job.layout;
    const int group_runs = layout.group_cols / kRunInputs;
    const std::uint8_t *panel[P];
    const std::int8_t *x[R];
    const std::int32_t *sums[R];
    float *out[R];
    MOESERVE_UNROLL for (int p = 0; p < P; ++p) panel[p] = place.panel(p);
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
      x[r] = place.x<std::int8_t>(r);
      sums[r] = place.sums(r);
      out[r] = place.out(r, 0);
    }
    TileAhead<R, P, kBytes, kPanelOutputs> ahead(place);
    Vec::I total[R][P];
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
        total[r][p] = Vec::iset1(0);
    for (int g = 0, run = 0; g < layout.num_groups; ++g) {
      ahead.group(g);
      for (const int end = run + group_runs; run < end; ++run) {
        Vec::I sum[R][P];
        MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
            sum[r][p] = Vec::iset1(sums[r][run]);
        const int first = run * kRunChunks;
        ahead.for_chunks(first, first + kRunChunks, [&](int c) __attribute__((always_inline)) {
          Vec::I low[P], high[P];
          MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
            Codes::take_apart(Vec::load64(panel[p] + c * kChunkBytes), low[p], high[p]);
          }
          Codes::add_products<R, P>(low, x, 8 * c, sum);
          Codes::add_products<R, P>(high, x, 8 * c + 4, sum);
        });
        MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
          const Vec::I factor = Vec::load_s8_low(factors_of(layout, panel[p], g));
          MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
            total[r][p] = Vec::mul_add_small(total[r][p], sum[r][p], factor);
          }
        }
      }
    }
    store_results<R, P>(place, total, out);
  }
};

// Many rows: weights are widened to int8 for a block of inputs, which stays in the first-level
// cache while all rows pass by; from there on they are those of int8. Between blocks sums stand in
// `out`.
class ExpandedProduct {
 public:
  static void run(const GemmJob &job) {
    alignas(64) Codes codes[kPanels];
    RowsAhead rows_ahead(job, num_tiles<kRows, kPanels>(job));
    for (int panel = 0; panel < job.num_panels;) {
      const int left = job.num_panels - panel;
      // Two pairs are better than three and a lone one.
      if (kPanels >= 3 && left >= 3 && left != 4) {
        panel += run_panels<kPanels>(job, panel, codes, rows_ahead);
      } else if (kPanels >= 2 && left >= 2) {
        panel += run_panels<kPanels >= 2 ? 2 : 1>(job, panel, codes, rows_ahead);
      } else {
        panel += run_panels<1>(job, panel, codes, rows_ahead);
      }
    }
  }

 private:
  using Tile = IntTile<Format::kInt8, false>;
  static constexpr int kPanels = Tiles<Tile>::kManyPanels;
  static constexpr int kRows = Tiles<Tile>::kManyRows;
  // Widening writes what was not in the first-level cache, which few rows feel; sums come by for
  // each block, which many do.
  static constexpr int kFewRows = 20;
  static constexpr int kFewInputs = 256;
  static constexpr int kManyInputs = 512;
  using Codes = std::uint8_t[kManyInputs * kPanelOutputs];

  // [inputs / 4][16 outputs][4]: chunks of int8.
  struct Block {
    const GemmJob *job;
    const Codes *codes;
    int first_panel;
    int first_input;
    int num_inputs;
  };

  // Returns P.
  template <int P>
  static int run_panels(const GemmJob &job, int panel, Codes *codes, RowsAhead &rows_ahead) {
    const PackedLayout &layout = *job.layout;
    const std::int64_t row_tiles = (job.num_rows + kRows - 1) / kRows;
    PanelsAhead ahead = ahead_of(job, panel, P, row_tiles * (layout.padded_cols / kRunInputs));
    const int most = job.num_rows <= kFewRows ? kFewInputs : kManyInputs;
    for (int first = 0; first < layout.padded_cols; first += most) {
      const int left = layout.padded_cols - first;
      const Block block = {&job, codes, panel, first, left < most ? left : most};
      for (int p = 0; p < P; ++p) expand(block, p, codes[p]);
      for_row_tiles<kRows, P>(job.num_rows, [&](auto rows, int row) __attribute__((always_inline)) {
        rows_ahead.step();
        tile<decltype(rows)::value, P>(block, row, ahead);
      });
    }
    return P;
  }

  static void expand(const Block &block, int p, std::uint8_t *codes) {
    const PackedLayout &layout = *block.job->layout;
    const std::uint8_t *panel = block.job->panels + (block.first_panel + p) * layout.panel_bytes;
    const std::uint8_t *chunk = panel + block.first_input / 2 * kPanelOutputs;
    const std::int8_t *factors = factors_of(layout, panel, block.first_input / layout.group_cols);
    for (int i = 0; i < block.num_inputs; i += layout.group_cols) {
      const auto factor = Vec::load_factor(factors);
      factors += kPanelOutputs;
      for (int run = 0; run < layout.group_cols; run += kRunInputs) {
        MOESERVE_UNROLL for (int c = 0; c < kRunChunks; ++c) {
          Vec::I low, high;
          Vec::scale_nibbles(Vec::load64(chunk), factor, low, high);
          Vec::store64(codes, low);
          Vec::store64(codes + kChunkBytes, high);
          chunk += kChunkBytes;
          codes += 2 * kChunkBytes;
        }
      }
    }
  }

  template <int R, int P>
  static void tile(const Block &block, int first_row, PanelsAhead &all_ahead) {
    const GemmJob &job = *block.job;
    const Place place = {job, first_row, block.first_panel, all_ahead};
    const std::int8_t *x[R];
    const std::uint8_t *codes[P];
    float *out[R];
    Vec::I sum[R][P];
    MOESERVE_UNROLL for (int p = 0; p < P; ++p) codes[p] = block.codes[p];
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
      x[r] = place.x<std::int8_t>(r) + block.first_input;
      out[r] = place.out(r, 0);
    }
    if (block.first_input == 0) {
      const int total = job.row_format->num_groups;
      MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
          sum[r][p] = Vec::iset1(place.sums(r)[total]);
    } else {
      MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
          sum[r][p] = Vec::load64(bytes_of(out[r], p));
    }
    PanelsAhead ahead = all_ahead;
    for (int i = 0; i < block.num_inputs;) {
      ahead.template step<P>();
      const int stop = i + kRunInputs;
      do {
        Vec::I four[P];
        MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
          four[p] = Vec::load64(codes[p] + i * kPanelOutputs);
        }
        Tile::template add_products<R, P>(four, x, i, sum);
        i += 4;
      } while (i < stop);
    }
    all_ahead = ahead;
    if (block.first_input + block.num_inputs == job.layout->padded_cols) {
      store_results<R, P>(place, sum, out);
    } else {
      MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
          Vec::store64(bytes_of(out[r], p), sum[r][p]);
    }
  }

  MOESERVE_INLINE static std::uint8_t *bytes_of(float *out, int p) {
    return reinterpret_cast<std::uint8_t *>(out + p * kPanelOutputs);
  }
};

}  // namespace
