// Tiles of a product: R rows times P panels with all sums in registers, for every format.
//
// Every output is one chain of multiply-adds over the inputs in their order, group by group: which
// tile computes it changes nothing, and so the same row gives the same bits in every batch. A tile
// may reach beyond the last row: it then computes that row again and stores it again.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "gemm_decoders.h"

namespace {

using moeserve::GemmJob;
using moeserve::RowForm;

// How far ahead of its use a weight is asked for; beyond a page the hardware's own stops.
constexpr int kPrefetchBytes = 768;
constexpr int kPrefetchScaleBytes = 256;
// Chunks of a panel after which more of the next panels is asked for.
constexpr int kStepChunks = 4;
// Tiles of at most that many rows read weights as fast as they come.
constexpr int kStreamRows = 4;

// Panels that come after those being multiplied. Asking for them bit by bit, over all tiles that
// read the present ones, keeps the memory busy while the arithmetic takes longer than reading.
// Several panels at a time: the hardware follows each as a stream of its own. A step has no branch
// that depends on where it stands: a wrong guess costs as much as tens of products.
class PanelsAhead {
 public:
  // `num_panels` of panel_bytes each, in `num_steps` steps of num_streams prefetches or a multiple;
  // or nothing: then it asks again and again for what is at `panels`.
  PanelsAhead(const std::uint8_t *panels, int num_panels, int num_streams, std::size_t panel_bytes,
              std::int64_t num_steps)
      : line_(panels), end_(panels) {
    if (num_panels < 1) return;
    end_ = panels + panel_bytes;
    const auto bytes = static_cast<std::int64_t>(panel_bytes);
    step_lines_ = static_cast<int>((bytes / kChunkBytes + num_steps - 1) / num_steps);
    const std::int64_t lines = num_steps * step_lines_;
    line_bytes_ = static_cast<std::size_t>((bytes + lines - 1) / lines);
    // Fewer panels than streams: these overlap.
    if (num_streams > 1) {
      stream_bytes_ = panel_bytes * static_cast<std::size_t>(num_panels - 1) /
                      static_cast<std::size_t>(num_streams - 1);
    }
  }

  template <int kStreams>
  MOESERVE_INLINE void step() {
    for (int i = 0; i < step_lines_; ++i) {
      MOESERVE_UNROLL for (int s = 0; s < kStreams; ++s) Vec::prefetch(line_ + s * stream_bytes_);
      line_ += line_bytes_;
    }
  }
  // What is left where some of the tiles took no steps: tiles of few rows follow their own streams.
  template <int kStreams>
  MOESERVE_INLINE void finish() {
    for (; line_ < end_; line_ += kChunkBytes) {
      MOESERVE_UNROLL for (int s = 0; s < kStreams; ++s) Vec::prefetch(line_ + s * stream_bytes_);
    }
  }

 private:
  const std::uint8_t *line_;    // of the first stream, to be asked for next
  const std::uint8_t *end_;     // of the first stream
  std::size_t line_bytes_ = 0;  // to the next one: less than a line where steps are many
  std::size_t stream_bytes_ = 0;
  int step_lines_ = 1;
};

// Rows that come after those being multiplied, asked for bit by bit, tile by tile.
class RowsAhead {
 public:
  RowsAhead(const GemmJob &job, std::int64_t num_tiles)
      : line_(job.next_rows), left_(job.next_rows == nullptr ? 0 : job.next_rows_bytes) {
    const std::size_t part = left_ / static_cast<std::size_t>(num_tiles);
    step_bytes_ = (part / kChunkBytes + 1) * kChunkBytes;
  }
  void step() {
    for (std::size_t due = step_bytes_; due > 0 && left_ > 0; due -= kChunkBytes) {
      Vec::prefetch(line_);
      line_ += kChunkBytes;
      left_ -= left_ < kChunkBytes ? left_ : kChunkBytes;
    }
  }

 private:
  const std::uint8_t *line_;
  std::size_t left_;
  std::size_t step_bytes_;
};

// Where a tile stands.
struct Place;

// Few rows: each of P panels asks for its own next lines, and at its end for the first ones of the
// panel that will follow. kStepBytes: how far a step goes.
template <int P, int kStepBytes>
class StreamsAhead {
 public:
  // From `offset` in the panels on, `num_steps` steps; `lead_bytes` ahead.
  StreamsAhead(const Place &place, std::size_t offset, int num_steps, int lead_bytes);
  MOESERVE_INLINE void at(int step) {
    if (step == split_) {
      MOESERVE_UNROLL for (int p = 0; p < P; ++p) line_[p] = next_[p];
    }
    MOESERVE_UNROLL for (int p = 0; p < P; ++p) Vec::prefetch(line_[p] + step * kStepBytes);
  }

 private:
  const std::uint8_t *line_[P];  // what is asked for at step 0
  const std::uint8_t *next_[P];  // the same for the steps from split_ on
  int split_;
};

struct Place {
  const GemmJob &job;
  int first_row;
  int first_panel;
  PanelsAhead &ahead;
  const std::uint8_t *following = nullptr;  // the panel after those of this tile; or none

  std::size_t row(int r) const {
    return static_cast<std::size_t>(first_row + r < job.num_rows ? first_row + r
                                                                 : job.num_rows - 1);
  }
  // The same row's place in job.rows.
  std::size_t source(int r) const {
    return job.row_ids == nullptr ? row(r) : static_cast<std::size_t>(job.row_ids[row(r)]);
  }
  const std::uint8_t *panel(int p) const {
    return job.panels + (first_panel + p) * job.layout->panel_bytes;
  }
  template <class Number>
  const Number *x(int r) const {
    return reinterpret_cast<const Number *>(job.rows.data + source(r) * job.row_format->data_bytes);
  }
  const std::int32_t *sums(int r) const {
    return job.rows.sums + source(r) * static_cast<std::size_t>(job.row_format->num_groups);
  }
  float *out(int r, int p) const {
    return job.out + row(r) * job.out_stride + (first_panel + p) * kPanelOutputs;
  }
};

template <int P, int kStepBytes>
StreamsAhead<P, kStepBytes>::StreamsAhead(const Place &place, std::size_t offset, int num_steps,
                                          int lead_bytes) {
  const int lead = lead_bytes / kStepBytes;
  split_ = num_steps > lead ? num_steps - lead : 0;
  for (int p = 0; p < P; ++p) {
    line_[p] = next_[p] = place.panel(p) + offset + lead_bytes;
    if (place.following != nullptr) {
      next_[p] = place.following + p * place.job.layout->panel_bytes + offset -
                 static_cast<std::ptrdiff_t>(split_) * kStepBytes;
    }
  }
}

template <int R, int P>
MOESERVE_INLINE void clear(Vec::F (&sum)[R][P]) {
  MOESERVE_UNROLL for (int r = 0; r < R; ++r) MOESERVE_UNROLL for (int p = 0; p < P; ++p)
      sum[r][p] = Vec::zero();
}

// What a tile asks for on its way through its panels. Many rows take longer to compute than to
// read, and ask for the next panels meanwhile. kApart: outside the inner loop, whose pointers to
// rows and panels take all registers that there are for addresses.
template <int R, int P, bool kApart>
class TileAhead {
 public:
  explicit TileAhead(const Place &place) : place_(place), panels_(place.ahead) {}
  ~TileAhead() { place_.ahead = panels_; }
  MOESERVE_INLINE void group(int) {}
  // body(chunk) for the chunks from begin to end.
  template <class Body>
  MOESERVE_INLINE void for_chunks(int begin, int end, const Body &body) {
    if constexpr (kApart) {
      for (int c = begin; c < end;) {
        panels_.template step<P>();
        const int stop = c + kStepChunks < end ? c + kStepChunks : end;
        do body(c);
        while (++c < stop);
      }
    } else {
      for (int c = begin; c < end; ++c) {
        if ((c - begin) % kStepChunks == 0) panels_.template step<P>();
        body(c);
      }
    }
  }

 private:
  const Place &place_;
  PanelsAhead panels_;  // a copy: through the reference it would stay in memory
};

template <int R, int P, bool kApart>
  requires(R <= kStreamRows)
class TileAhead<R, P, kApart> {
 public:
  explicit TileAhead(const Place &place)
      : chunks_(place, 0, place.job.layout->num_chunks, kPrefetchBytes),
        scales_(place, place.job.layout->scale_offset, place.job.layout->num_groups,
                kPrefetchScaleBytes) {}
  template <class Body>
  MOESERVE_INLINE void for_chunks(int begin, int end, const Body &body) {
    for (int c = begin; c < end; ++c) {
      chunks_.at(c);
      body(c);
    }
  }
  // Scales of a group are a vector of bf16.
  MOESERVE_INLINE void group(int g) { scales_.at(g); }

 private:
  StreamsAhead<P, kChunkBytes> chunks_;
  StreamsAhead<P, 2 * kPanelOutputs> scales_;
};

// Weights as floats times rows of floats. kAsymmetric: int4 with stored zero points.
template <Format kFormat, bool kAsymmetric>
struct FloatTile {
  static constexpr bool kGrouped = !moeserve::is_float(kFormat);
  static constexpr bool kBytes = false;
  static constexpr int kInputs = chunk_inputs(kFormat);

  template <int R, int P>
  static void run(const Place &place) {
    const PackedLayout &layout = *place.job.layout;
    const Decoder<kFormat> decoder(layout);
    const std::uint8_t *panel[P];
    const float *x[R];
    MOESERVE_UNROLL for (int p = 0; p < P; ++p) panel[p] = place.panel(p);
    MOESERVE_UNROLL for (int r = 0; r < R; ++r) x[r] = place.x<float>(r);
    TileAhead<R, P, kBytes> ahead(place);
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
          const Vec::F scale = load_scale<kFormat>(layout, panel[p], g);
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
                                         TileAhead<R, P, kBytes> &ahead) {
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
        MOESERVE_UNROLL for (int p = 0; p < P; ++p) {
          const Vec::F product = Vec::mul(Vec::to_float(acc[r][p]), scale[p]);
          Vec::store(place.out(r, p), Vec::mul(product, own));
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
