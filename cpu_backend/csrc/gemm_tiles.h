// Tiles of a product: R rows times P panels with all sums in registers, for every format.
//
// Every output is one chain of multiply-adds over the inputs in their order, group by group: which
// tile computes it changes nothing, and so the same row gives the same bits in every batch. A tile
// may reach beyond the last row: it then computes that row again and stores it again.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "gemm_ahead.h"

namespace {

using moeserve::RowForm;

template <int R, int P>
MOESERVE_INLINE void clear(Vec::F (&sum)[R][P]) {
  MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
      sum[r][p] = Vec::zero();
}

// Weights as floats times rows of floats. kAsymmetric: int4 with stored zero points.
template <Format kFormat, bool kAsymmetric>
struct FloatTile {
  static constexpr bool kGrouped = !moeserve::is_float(kFormat);
  static constexpr bool kBytes = false;
  static constexpr bool kFactors = kFormat == Format::kInt4 && !kAsymmetric;
  static constexpr int kInputs = chunk_inputs(kFormat);
  // A byte of factors or a bf16 scale for each output of a group.
  template <int R, int P>
  using Ahead = TileAhead<R, P, kBytes, kFactors ? kPanelOutputs : 2 * kPanelOutputs>;

  template <int R, int P>
  static void run(const Place &place) {
    const PackedLayout &layout = *place.job.layout;
    const Decoder<kFormat> decoder(layout);
    const std::uint8_t *panel[P];
    const float *x[R];
    MOESERVE_UNROLL for (int p = 0; p < P; ++p) panel[p] = place.panel(p);
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) x[r] = place.x<float>(r);
    Ahead<R, P> ahead(place);
    Vec::F total[R][P];
    if constexpr (!kGrouped) {
      sum_chunks<R, P>(decoder, panel, x, 0, layout.num_chunks, nullptr, total, ahead);
    } else {
      const int group_chunks = layout.group_cols / kInputs;
      clear(total);
      for (int g = 0; g < layout.num_groups; ++g) {
        Vec::F zero[P], part[R][P];
        if constexpr (kAsymmetric) {
          MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
            zero[p] =
                Vec::to_float(Vec::load_u8(panel[p] + layout.zero_offset + kPanelOutputs * g));
          }
        }
        ahead.group(g);
        const int begin = g * group_chunks;
        const int end =
            begin + group_chunks < layout.num_chunks ? begin + group_chunks : layout.num_chunks;
        sum_chunks<R, P>(decoder, panel, x, begin, end, zero, part, ahead);
        MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
          const Vec::F scale = load_scale<kFormat, kFactors>(layout, panel[p], g);
          MOESERVE_UNROLL for (int r = 0; r < R; ++r) total[r][p] =
              Vec::fma(part[r][p], scale, total[r][p]);
        }
      }
    }
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
        Vec::store(place.out(r, p), total[r][p]);
  }

 private:
  template <int R, int P>
  MOESERVE_INLINE static void sum_chunks(const Decoder<kFormat> &decoder,
                                         const std::uint8_t *const (&panel)[P],
                                         const float *const (&x)[R], int begin, int end,
                                         const Vec::F *zero, Vec::F (&sum)[R][P],
                                         Ahead<R, P> &ahead) {
    clear(sum);
    ahead.for_chunks(begin, end, [&](int c) __attribute__((always_inline)) {
      unroll<kInputs>([&](auto j) __attribute__((always_inline)) {
        Vec::F weight[P];
        MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
          weight[p] = decoder.template at<decltype(j)::value>(panel[p] + c * kChunkBytes);
          if constexpr (kAsymmetric) weight[p] = Vec::sub(weight[p], zero[p]);
        }
        MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
          const Vec::F factor = Vec::set1(x[r][c * kInputs + decltype(j)::value]);
          MOESERVE_UNROLL for (int p = 0; p < P; ++p) sum[r][p] =
              Vec::fma(weight[p], factor, sum[r][p]);
        }
      });
    });
  }
};

// Pairs of bf16 weights times pairs of bf16 inputs, by the instruction for that.
struct Bf16Tile {
  static constexpr bool kGrouped = false;
  static constexpr bool kBytes = false;

  template <int R, int P>
  static void run(const Place &place) {
    if constexpr (Vec::kHasBf16Dot) {
      const std::uint8_t *panel[P];
      const std::uint16_t *x[R];
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) panel[p] = place.panel(p);
      MOESERVE_UNROLL for (int r = 0; r < R; ++r) x[r] = place.x<std::uint16_t>(r);
      TileAhead<R, P, kBytes> ahead(place);
      Vec::F sum[R][P];
      clear(sum);
      ahead.for_chunks(0, place.job.layout->num_chunks, [&](int c) __attribute__((always_inline)) {
        Vec::I weight[P];
        MOESERVE_UNROLL for (int p = 0; p < P; ++p) weight[p] =
            Vec::load64(panel[p] + c * kChunkBytes);
        MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
            sum[r][p] = Vec::bf16_dot(sum[r][p], weight[p], x[r] + 2 * c);
      });
      MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
          Vec::store(place.out(r, p), sum[r][p]);
    }
  }
};

// Integer codes times rows of int8: exact sums over a group, scaled as floats.
template <Format kFormat, bool kAsymmetric>
struct IntTile {
  static constexpr bool kGrouped = kFormat != Format::kInt8;
  static constexpr bool kBytes = !kGrouped;

  template <int R, int P>
  static void run(const Place &place) {
    const PackedLayout &layout = *place.job.layout;
    const std::uint8_t *panel[P];
    const std::int8_t *x[R];
    const std::int32_t *sums[R];
    MOESERVE_UNROLL for (int p = 0; p < P; ++p) panel[p] = place.panel(p);
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
      x[r] = place.x<std::int8_t>(r);
      sums[r] = place.sums(r);
    }
    TileAhead<R, P, kBytes> ahead(place);
    if constexpr (kGrouped) {
      Vec::F total[R][P];
      clear(total);
      const int group_chunks = layout.group_cols / chunk_inputs(kFormat);
      for (int g = 0; g < layout.num_groups; ++g) {
        Vec::I acc[R][P];
        ahead.group(g);
        sum_chunks<R, P>(layout, panel, x, sums, g, group_chunks, acc, ahead);
        MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
          const Vec::F scale = load_scale<kFormat>(layout, panel[p], g);
          MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
            total[r][p] = Vec::fma(Vec::to_float(acc[r][p]), scale, total[r][p]);
          }
        }
      }
      MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
        const Vec::F scale = Vec::set1(row_scale(place.job, place.source(r)));
        MOESERVE_UNROLL for (int p = 0; p < P; ++p)
            Vec::store(place.out(r, p), Vec::mul(total[r][p], scale));
      }
    } else {
      Vec::I acc[R][P];
      sum_chunks<R, P>(layout, panel, x, sums, 0, layout.num_chunks, acc, ahead);
      Vec::F scale[P];
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) scale[p] =
          load_scale<kFormat>(layout, panel[p], 0);
      MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
        const Vec::F own = Vec::set1(row_scale(place.job, place.source(r)));
        float *out = place.out(r, 0);
        MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
          const Vec::F product = Vec::mul(Vec::to_float(acc[r][p]), scale[p]);
          Vec::store(out + p * kPanelOutputs, Vec::mul(product, own));
        }
      }
    }
  }

  // The integer codes of e2m1 are twice its values.
  static float row_scale(const GemmJob &job, std::size_t source) {
    const float scale = job.rows.scales[source];
    return kFormat == Format::kMxfp4 ? 0.5f * scale : scale;
  }

  // Sums of a group start with what the codes' zero points add up to. `own`: the group's place in
  // the rows' `sums`.
  template <int R, int P>
  MOESERVE_INLINE static void start_group(const PackedLayout &layout,
                                          const std::uint8_t *const *panel, int group,
                                          const std::int32_t *const (&sums)[R], int own,
                                          Vec::I (&acc)[R][P]) {
    MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
      if constexpr (kAsymmetric) {
        const Vec::I zero = Vec::load_u8(panel[p] + layout.zero_offset + kPanelOutputs * group);
        MOESERVE_UNROLL for (int r = 0; r < R; ++r) acc[r][p] = Vec::mul_small(zero, sums[r][own]);
      } else {
        MOESERVE_UNROLL for (int r = 0; r < R; ++r) acc[r][p] = Vec::iset1(sums[r][own]);
      }
    }
  }

  // A chunk of nibbles to the bytes of its inputs 0-3 and 4-7.
  MOESERVE_INLINE static void take_apart(Vec::I raw, Vec::I &low, Vec::I &high) {
    low = Vec::low_nibbles(raw);
    high = Vec::high_nibbles(raw);
    if constexpr (kFormat == Format::kMxfp4) {
      const Vec::I table = Vec::byte_table(kShiftedFp4);
      low = Vec::look_up(table, low);
      high = Vec::look_up(table, high);
    }
  }

  template <int R, int P>
  MOESERVE_INLINE static void add_products(const Vec::I (&codes)[P],
                                           const std::int8_t *const (&x)[R], int input,
                                           Vec::I (&acc)[R][P]) {
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
      const auto four = Vec::broadcast4(x[r] + input);
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) acc[r][p] = Vec::dot(acc[r][p], codes[p], four);
    }
  }

 private:
  // One group of `count` chunks.
  template <int R, int P>
  MOESERVE_INLINE static void sum_chunks(const PackedLayout &layout,
                                         const std::uint8_t *const (&panel)[P],
                                         const std::int8_t *const (&x)[R],
                                         const std::int32_t *const (&sums)[R], int group, int count,
                                         Vec::I (&acc)[R][P], TileAhead<R, P, kBytes> &ahead) {
    start_group<R, P>(layout, panel, group, sums, group, acc);
    ahead.for_chunks(group * count, (group + 1) * count, [&](int c) __attribute__((always_inline)) {
      add_chunk<R, P>(panel, x, c, acc);
    });
  }

  template <int R, int P>
  MOESERVE_INLINE static void add_chunk(const std::uint8_t *const (&panel)[P],
                                        const std::int8_t *const (&x)[R], int c,
                                        Vec::I (&acc)[R][P]) {
    if constexpr (kFormat == Format::kInt8) {
      Vec::I codes[P];
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) codes[p] =
          Vec::load64(panel[p] + c * kChunkBytes);
      add_products<R, P>(codes, x, 4 * c, acc);
    } else {
      Vec::I low[P], high[P];
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
        take_apart(Vec::load64(panel[p] + c * kChunkBytes), low[p], high[p]);
      }
      add_products<R, P>(low, x, 8 * c, acc);
      add_products<R, P>(high, x, 8 * c + 4, acc);
    }
  }

  // Twice the values of e2m1, plus 12: unsigned.
  static constexpr std::uint8_t kShiftedFp4[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                   12, 11, 10, 9,  8,  6,  4,  0};
};

}  // namespace
