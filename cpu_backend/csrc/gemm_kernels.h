// Products of rows with packed panels, for every format, over the Vec of one ISA level.
//
// A tile computes R rows times P panels with all its sums in registers. Every output is one chain
// of multiply-adds over the inputs in their order, group by group: which tile computes it changes
// nothing, and so the same row gives the same bits in every batch. Tiles of few rows take more
// panels: their time is the reading of weights, and several streams keep more of it in flight.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "kernels.h"

namespace {

using moeserve::chunk_inputs;
using moeserve::Format;
using moeserve::GemmJob;
using moeserve::kChunkBytes;
using moeserve::kPanelOutputs;
using moeserve::PackedLayout;
using moeserve::RowForm;

// Sums live in registers only where every loop over them is unrolled.
#define MOESERVE_UNROLL _Pragma("GCC unroll 32")
#define MOESERVE_INLINE inline __attribute__((always_inline))

// How far ahead of its use a weight is asked for; beyond a page the hardware's own stops.
constexpr int kPrefetchBytes = 768;

// Tile sizes. Sums take R * P vectors (twice that with groups), and each vector of AVX2 two
// registers.
template <bool kGrouped>
struct Tiles {
  static constexpr bool kWide = Vec::kRegisters >= 32;
  static constexpr int kFewPanels = kWide ? 4 : 2;
  static constexpr int kFewRows = kWide ? (kGrouped ? 2 : 4) : 1;
  static constexpr int kManyPanels = kWide ? 2 : 1;
  static constexpr int kManyRows = kWide ? (kGrouped ? 6 : 12) : (kGrouped ? 3 : 6);
};

// -- reading weights as floats ------------------------------------------------------------------

// One decoder for each format: `at<J>` is input J of a chunk, without its scale.
template <Format kFormat>
struct Decoder;

template <>
struct Decoder<Format::kF32> {
  explicit Decoder(const PackedLayout &) {}
  template <int J>
  MOESERVE_INLINE Vec::F at(const std::uint8_t *chunk) const {
    return Vec::load(reinterpret_cast<const float *>(chunk));
  }
};

template <>
struct Decoder<Format::kBF16> {
  explicit Decoder(const PackedLayout &) {}
  template <int J>
  MOESERVE_INLINE Vec::F at(const std::uint8_t *chunk) const {
    const auto raw = Vec::load64(chunk);
    return J == 0 ? Vec::bf16_even(raw) : Vec::bf16_odd(raw);
  }
};

template <>
struct Decoder<Format::kInt8> {
  explicit Decoder(const PackedLayout &) {}
  template <int J>
  MOESERVE_INLINE Vec::F at(const std::uint8_t *chunk) const {
    return Vec::byte_at<J>(Vec::load64(chunk), 128);
  }
};

// Codes of int4 as they are; `kSymmetricZero` or a stored zero point is taken off elsewhere.
template <>
struct Decoder<Format::kInt4> {
  explicit Decoder(const PackedLayout &layout) : table(Vec::table(values(layout.asymmetric))) {}
  template <int J>
  MOESERVE_INLINE Vec::F at(const std::uint8_t *chunk) const {
    return Vec::nibble_at<J>(Vec::load64(chunk), table);
  }
  static const float *values(bool asymmetric) {
    static constexpr float kCodes[24] = {-8, -7, -6, -5, -4, -3, -2, -1, 0,  1,  2,  3,
                                         4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15};
    return asymmetric ? kCodes + 8 : kCodes;
  }
  Vec::Table table;
};

template <>
struct Decoder<Format::kMxfp4> {
  explicit Decoder(const PackedLayout &) : table(make()) {}
  template <int J>
  MOESERVE_INLINE Vec::F at(const std::uint8_t *chunk) const {
    return Vec::nibble_at<J>(Vec::load64(chunk), table);
  }
  static Vec::Table make() {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = 0.5f * moeserve::kDoubledFp4[i];
    return Vec::table(values);
  }
  Vec::Table table;
};

template <>
struct Decoder<Format::kFp8> {
  explicit Decoder(const PackedLayout &) {}
  template <int J>
  MOESERVE_INLINE Vec::F at(const std::uint8_t *chunk) const {
    return Vec::load_e4m3_scaled(chunk + kPanelOutputs * J);
  }
};

template <Format kFormat>
MOESERVE_INLINE Vec::F load_scale(const PackedLayout &layout, const std::uint8_t *panel,
                                  int group) {
  const std::uint8_t *scales = panel + layout.scale_offset;
  if constexpr (kFormat == Format::kInt8 || kFormat == Format::kFp8) {
    return Vec::load(reinterpret_cast<const float *>(scales) + kPanelOutputs * group);
  } else {
    return Vec::load_bf16(reinterpret_cast<const std::uint16_t *>(scales) + kPanelOutputs * group);
  }
}

template <int kValue>
struct Index {
  static constexpr int value = kValue;
};

// Calls body(Index<0>{}) ... body(Index<kCount - 1>{}): a number that types can depend on.
template <int kCount, int kFrom = 0, class Body>
MOESERVE_INLINE void unroll(const Body &body) {
  if constexpr (kFrom < kCount) {
    body(Index<kFrom>{});
    unroll<kCount, kFrom + 1>(body);
  }
}

// -- tiles ----------------------------------------------------------------------------------------

// Weights as floats times rows of floats. kAsymmetric: int4 with stored zero points.
template <Format kFormat, bool kAsymmetric>
struct FloatTile {
  static constexpr bool kGrouped = !moeserve::is_float(kFormat);
  static constexpr int kInputs = chunk_inputs(kFormat);

  template <int R, int P>
  static void run(const GemmJob &job, int first_row, int first_panel) {
    const PackedLayout &layout = *job.layout;
    const Decoder<kFormat> decoder(layout);
    const std::uint8_t *panel[P];
    const float *x[R];
    MOESERVE_UNROLL for (int p = 0; p < P; ++p) panel[p] =
        job.panels + (first_panel + p) * layout.panel_bytes;
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
      x[r] = reinterpret_cast<const float *>(job.rows.data +
                                             (first_row + r) * job.row_format->data_bytes);
    }
    Vec::F total[R][P];
    if constexpr (!kGrouped) {
      sum_chunks<R, P>(decoder, panel, x, 0, layout.num_chunks, nullptr, total);
    } else {
      const int group_chunks = layout.group_cols / kInputs;
      MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
          total[r][p] = Vec::zero();
      for (int g = 0; g < layout.num_groups; ++g) {
        Vec::F zero[P], part[R][P];
        if constexpr (kAsymmetric) {
          MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
            zero[p] =
                Vec::to_float(Vec::load_u8(panel[p] + layout.zero_offset + kPanelOutputs * g));
          }
        }
        const int begin = g * group_chunks;
        const int end =
            begin + group_chunks < layout.num_chunks ? begin + group_chunks : layout.num_chunks;
        sum_chunks<R, P>(decoder, panel, x, begin, end, zero, part);
        MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
          const Vec::F scale = load_scale<kFormat>(layout, panel[p], g);
          MOESERVE_UNROLL for (int r = 0; r < R; ++r) total[r][p] =
              Vec::fma(part[r][p], scale, total[r][p]);
        }
      }
    }
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
      Vec::store(job.out + (first_row + r) * job.out_stride + (first_panel + p) * kPanelOutputs,
                 total[r][p]);
    }
  }

 private:
  template <int R, int P>
  MOESERVE_INLINE static void sum_chunks(const Decoder<kFormat> &decoder,
                                         const std::uint8_t *const (&panel)[P],
                                         const float *const (&x)[R], int begin, int end,
                                         const Vec::F *zero, Vec::F (&sum)[R][P]) {
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
        sum[r][p] = Vec::zero();
    for (int c = begin; c < end; ++c) {
      if constexpr (R <= 2) {
        MOESERVE_UNROLL for (int p = 0; p < P; ++p)
            Vec::prefetch(panel[p] + c * kChunkBytes + kPrefetchBytes);
      }
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
    }
  }
};

// Pairs of bf16 weights times pairs of bf16 inputs, by the instruction for that.
struct Bf16Tile {
  static constexpr bool kGrouped = false;

  template <int R, int P>
  static void run(const GemmJob &job, int first_row, int first_panel) {
    if constexpr (Vec::kHasBf16Dot) {
      const PackedLayout &layout = *job.layout;
      const std::uint8_t *panel[P];
      const std::uint16_t *x[R];
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) panel[p] =
          job.panels + (first_panel + p) * layout.panel_bytes;
      MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
        x[r] = reinterpret_cast<const std::uint16_t *>(
            job.rows.data + (first_row + r) * job.row_format->data_bytes);
      }
      Vec::F sum[R][P];
      MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
          sum[r][p] = Vec::zero();
      for (int c = 0; c < layout.num_chunks; ++c) {
        if constexpr (R <= 2) {
          MOESERVE_UNROLL for (int p = 0; p < P; ++p)
              Vec::prefetch(panel[p] + c * kChunkBytes + kPrefetchBytes);
        }
        Vec::I weight[P];
        MOESERVE_UNROLL for (int p = 0; p < P; ++p) weight[p] =
            Vec::load64(panel[p] + c * kChunkBytes);
        MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
          sum[r][p] = Vec::bf16_dot(sum[r][p], weight[p], x[r] + 2 * c);
        }
      }
      MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
        Vec::store(job.out + (first_row + r) * job.out_stride + (first_panel + p) * kPanelOutputs,
                   sum[r][p]);
      }
    }
  }
};

// Integer codes times rows of int8: exact sums over a group, scaled as floats.
template <Format kFormat, bool kAsymmetric>
struct IntTile {
  static constexpr bool kGrouped = kFormat != Format::kInt8;

  template <int R, int P>
  static void run(const GemmJob &job, int first_row, int first_panel) {
    const PackedLayout &layout = *job.layout;
    const std::uint8_t *panel[P];
    const std::int8_t *x[R];
    const std::int32_t *sums[R];
    MOESERVE_UNROLL for (int p = 0; p < P; ++p) panel[p] =
        job.panels + (first_panel + p) * layout.panel_bytes;
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
      x[r] = reinterpret_cast<const std::int8_t *>(job.rows.data +
                                                   (first_row + r) * job.row_format->data_bytes);
      sums[r] = job.rows.sums + (first_row + r) * job.row_format->num_groups;
    }
    Vec::F total[R][P];
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
        total[r][p] = Vec::zero();
    const int group_chunks =
        kGrouped ? layout.group_cols / chunk_inputs(kFormat) : layout.num_chunks;
    for (int g = 0; g < layout.num_groups; ++g) {
      Vec::I acc[R][P];
      start_group<R, P>(layout, panel, g, sums, g, acc);
      const int begin = g * group_chunks;
      for (int c = begin; c < begin + group_chunks; ++c) add_chunk<R, P>(panel, x, c, acc);
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
        const Vec::F scale = load_scale<kFormat>(layout, panel[p], g);
        MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
          total[r][p] = Vec::fma(Vec::to_float(acc[r][p]), scale, total[r][p]);
        }
      }
    }
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
      const Vec::F scale = Vec::set1(row_scale(job, first_row + r));
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
        Vec::store(job.out + (first_row + r) * job.out_stride + (first_panel + p) * kPanelOutputs,
                   Vec::mul(total[r][p], scale));
      }
    }
  }

  // The integer codes of e2m1 are twice its values.
  static float row_scale(const GemmJob &job, int row) {
    const float scale = job.rows.scales[row];
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
  template <int R, int P>
  MOESERVE_INLINE static void add_chunk(const std::uint8_t *const (&panel)[P],
                                        const std::int8_t *const (&x)[R], int c,
                                        Vec::I (&acc)[R][P]) {
    if constexpr (R <= 2) {
      MOESERVE_UNROLL for (int p = 0; p < P; ++p)
          Vec::prefetch(panel[p] + c * kChunkBytes + kPrefetchBytes);
    }
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

// Four-bit codes for many rows: taking nibbles apart costs as much as three rows' products, so it
// is done once for a block of inputs, into bytes that stay in the first-level cache while all rows
// pass by. The arithmetic, and with it every bit of the result, is IntTile's.
template <Format kFormat, bool kAsymmetric>
struct UnpackedProduct {
  using Tile = IntTile<kFormat, kAsymmetric>;
  static constexpr int kPanels = Tiles<true>::kManyPanels;
  static constexpr int kRows = Tiles<true>::kManyRows;
  static constexpr int kBlockInputs = 768;

  struct Block {
    const GemmJob *job;
    const std::uint8_t *panel[kPanels];
    const std::uint8_t *codes[kPanels];  // [inputs / 4][16 outputs][4]
    int first_panel, num_panels;
    int first_group, num_groups;
    bool last;
  };

  static void run(const GemmJob &job) {
    alignas(64) std::uint8_t codes[kPanels][kBlockInputs * kPanelOutputs];
    const PackedLayout &layout = *job.layout;
    const int block_groups = kBlockInputs / layout.group_cols;
    for (int first = 0; first < job.num_panels; first += kPanels) {
      const int panels = job.num_panels - first < kPanels ? job.num_panels - first : kPanels;
      for (int g = 0; g < layout.num_groups; g += block_groups) {
        Block block = {};
        block.job = &job;
        block.first_panel = first;
        block.num_panels = panels;
        block.first_group = g;
        block.num_groups =
            layout.num_groups - g < block_groups ? layout.num_groups - g : block_groups;
        block.last = g + block.num_groups == layout.num_groups;
        const int group_chunks = layout.group_cols / chunk_inputs(kFormat);
        for (int p = 0; p < panels; ++p) {
          block.panel[p] = job.panels + (first + p) * layout.panel_bytes;
          block.codes[p] = codes[p];
          unpack(block.panel[p] + g * group_chunks * kChunkBytes, block.num_groups * group_chunks,
                 codes[p]);
        }
        if (panels == kPanels) {
          cover<kRows, kPanels>(block, 0);
        } else {
          cover<kRows, 1>(block, 0);
        }
      }
    }
  }

 private:
  static void unpack(const std::uint8_t *chunk, int num_chunks, std::uint8_t *codes) {
    for (int c = 0; c < num_chunks; ++c) {
      Vec::prefetch(chunk + c * kChunkBytes + kPrefetchBytes);
      Vec::I low, high;
      Tile::take_apart(Vec::load64(chunk + c * kChunkBytes), low, high);
      Vec::store64(codes + 2 * c * kChunkBytes, low);
      Vec::store64(codes + (2 * c + 1) * kChunkBytes, high);
    }
  }

  template <int R, int P>
  static void cover(const Block &block, int row) {
    for (; row + R <= block.job->num_rows; row += R) tile<R, P>(block, row);
    if constexpr (R > 1) cover<(R > 4 ? 4 : R > 2 ? 2 : 1), P>(block, row);
  }

  template <int R, int P>
  static void tile(const Block &block, int first_row) {
    const GemmJob &job = *block.job;
    const PackedLayout &layout = *job.layout;
    const int steps = layout.group_cols / 4;
    const std::int8_t *x[R];
    const std::int32_t *sums[R];
    float *out[R];
    Vec::F total[R][P];
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
      const std::size_t row = static_cast<std::size_t>(first_row + r);
      x[r] =
          reinterpret_cast<const std::int8_t *>(job.rows.data + row * job.row_format->data_bytes) +
          block.first_group * layout.group_cols;
      sums[r] = job.rows.sums + row * job.row_format->num_groups + block.first_group;
      out[r] = job.out + row * job.out_stride + block.first_panel * kPanelOutputs;
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
        total[r][p] = block.first_group == 0 ? Vec::zero() : Vec::load(out[r] + p * kPanelOutputs);
      }
    }
    for (int g = 0; g < block.num_groups; ++g) {
      Vec::I acc[R][P];
      Tile::template start_group<R, P>(layout, block.panel, block.first_group + g, sums, g, acc);
      // In runs of 32 inputs, the smallest group.
      for (int s = g * steps; s < (g + 1) * steps; s += 8) {
        MOESERVE_UNROLL for (int j = 0; j < 8; ++j) {
          Vec::I codes[P];
          MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
            codes[p] = Vec::load64(block.codes[p] + (s + j) * kChunkBytes);
          }
          Tile::template add_products<R, P>(codes, x, 4 * (s + j), acc);
        }
      }
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
        const Vec::F scale = load_scale<kFormat>(layout, block.panel[p], block.first_group + g);
        MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
          total[r][p] = Vec::fma(Vec::to_float(acc[r][p]), scale, total[r][p]);
        }
      }
    }
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) {
      const Vec::F scale = Vec::set1(block.last ? Tile::row_scale(job, first_row + r) : 1.0f);
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
        Vec::store(out[r] + p * kPanelOutputs, Vec::mul(total[r][p], scale));
      }
    }
  }
};

// -- covering a job with tiles --------------------------------------------------------------------

// Rows from `row` on with P panels: as many tiles of R rows as fit, the rest with smaller ones.
template <class Tile, int R, int P>
MOESERVE_INLINE void cover_rows(const GemmJob &job, int row, int panel) {
  for (; row + R <= job.num_rows; row += R) Tile::template run<R, P>(job, row, panel);
  if constexpr (R > 1) {
    constexpr int kNext = R > 8 ? 8 : R > 4 ? 4 : R > 2 ? 2 : 1;
    cover_rows<Tile, kNext, P>(job, row, panel);
  }
}

template <class Tile>
void gemm_tiles(const GemmJob &job) {
  using T = Tiles<Tile::kGrouped>;
  int panel = 0;
  if (job.num_rows <= T::kFewRows) {
    for (; panel + T::kFewPanels <= job.num_panels; panel += T::kFewPanels) {
      cover_rows<Tile, T::kFewRows, T::kFewPanels>(job, 0, panel);
    }
  }
  for (; panel + T::kManyPanels <= job.num_panels; panel += T::kManyPanels) {
    cover_rows<Tile, T::kManyRows, T::kManyPanels>(job, 0, panel);
  }
  if constexpr (T::kManyPanels > 1) {
    for (; panel < job.num_panels; ++panel) cover_rows<Tile, T::kManyRows, 1>(job, 0, panel);
  }
}

// From how many rows on taking nibbles apart beforehand pays.
constexpr int kUnpackRows = 8;

template <Format kFormat, bool kAsymmetric>
void four_bit_gemm(const GemmJob &job) {
  if (job.num_rows >= kUnpackRows) return UnpackedProduct<kFormat, kAsymmetric>::run(job);
  gemm_tiles<IntTile<kFormat, kAsymmetric>>(job);
}

RowForm row_form(const PackedLayout &layout) {
  if (layout.format == Format::kBF16 && Vec::kHasBf16Dot) return RowForm::kBF16;
  const bool codes = layout.format == Format::kInt8 || moeserve::is_four_bit(layout.format);
  return codes && !layout.weight_only ? RowForm::kInt8 : RowForm::kF32;
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
      if (integer) return four_bit_gemm<Format::kInt4, false>(job);
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
