// Where a tile of a product stands, and what it asks the memory for ahead of its use.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "gemm_decoders.h"

namespace {

using moeserve::GemmJob;

// How far ahead of its use a weight is asked for, in all streams together: so much is on its way.
constexpr int kPrefetchBytes = 3072;
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
struct Place {
  const GemmJob &job;
  int first_row;
  int first_panel;
  PanelsAhead &ahead;
  const std::uint8_t *following = nullptr;  // the panel after those of this tile; or none

  MOESERVE_INLINE std::size_t row(int r) const {
    return static_cast<std::size_t>(first_row + r < job.num_rows ? first_row + r
                                                                 : job.num_rows - 1);
  }
  // The same row's place in job.rows.
  MOESERVE_INLINE std::size_t source(int r) const {
    return job.row_ids == nullptr ? row(r) : static_cast<std::size_t>(job.row_ids[row(r)]);
  }
  MOESERVE_INLINE const std::uint8_t *panel(int p) const {
    return job.panels + (first_panel + p) * job.layout->panel_bytes;
  }
  template <class Number>
  MOESERVE_INLINE const Number *x(int r) const {
    return reinterpret_cast<const Number *>(job.rows.data + source(r) * job.row_format->data_bytes);
  }
  MOESERVE_INLINE const std::int32_t *sums(int r) const {
    return job.rows.sums + source(r) * static_cast<std::size_t>(job.row_format->num_sums());
  }
  MOESERVE_INLINE float *out(int r, int p) const {
    return job.out + row(r) * job.out_stride + (first_panel + p) * kPanelOutputs;
  }
};

// Few rows: each of P panels asks for its own next lines, and at its end for the first ones of the
// panel that will follow. kStepBytes: how far a step goes.
template <int P, int kStepBytes>
class StreamsAhead {
 public:
  // From `offset` in the panels on, `num_steps` steps; `lead_bytes` ahead.
  StreamsAhead(const Place &place, std::size_t offset, int num_steps, int lead_bytes) {
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

// What a tile asks for on its way through its panels. Many rows take longer to compute than to
// read, and ask for the next panels meanwhile. kApart: outside the inner loop, whose pointers to
// rows and panels take all registers that there are for addresses.
// kGroupBytes: what a panel holds for a group beside its chunks, scales in bf16 for one.
template <int R, int P, bool kApart, int kGroupBytes = 2 * kPanelOutputs>
class TileAhead {
 public:
  explicit TileAhead(const Place &place) : place_(place), panels_(place.ahead) {}
  ~TileAhead() { place_.ahead = panels_; }
  MOESERVE_INLINE void group(int) {}
  // body(chunk) for the chunks from begin to end.
  template <class Body>
  MOESERVE_INLINE void for_chunks(int begin, int end, const Body &body) {
    if constexpr (kApart) {
      int c = begin;
      for (; c + kStepChunks <= end; c += kStepChunks) {
        panels_.template step<P>();
        MOESERVE_UNROLL for (int i = 0; i < kStepChunks; ++i) body(c + i);
      }
      if (c < end) panels_.template step<P>();
      for (; c < end; ++c) body(c);
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

template <int R, int P, bool kApart, int kGroupBytes>
  requires(R <= kStreamRows)
class TileAhead<R, P, kApart, kGroupBytes> {
 public:
  explicit TileAhead(const Place &place)
      : chunks_(place, 0, place.job.layout->num_chunks, kPrefetchBytes / P),
        scales_(place, place.job.layout->scale_offset, place.job.layout->num_groups,
                kPrefetchScaleBytes) {}
  template <class Body>
  MOESERVE_INLINE void for_chunks(int begin, int end, const Body &body) {
    for (int c = begin; c < end; ++c) {
      chunks_.at(c);
      body(c);
    }
  }
  MOESERVE_INLINE void group(int g) { scales_.at(g); }

 private:
  StreamsAhead<P, kChunkBytes> chunks_;
  StreamsAhead<P, kGroupBytes> scales_;
};

}  // namespace
