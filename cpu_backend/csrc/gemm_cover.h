// How rows and panels of a product are cut into tiles.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "gemm_tiles.h"

namespace {

// Tile sizes. Sums take R * P vectors (twice that with groups), and each vector of AVX2 two
// registers. Tiles of few rows take more panels: their time is the reading of weights, and several
// streams keep more of it in flight. Bytes are multiplied as they are read, so that many rows are
// as good on three panels as on two; and pointers to eight rows stay in registers, which those to
// twelve do not. Other weights are widened first, for as many rows as there are sums for.
template <class Tile>
struct Tiles {
  static constexpr bool kGrouped = Tile::kGrouped;
  static constexpr bool kWide = Vec::kRegisters >= 32;
  static constexpr bool kThree = kWide && Tile::kBytes;
  static constexpr int kFewPanels = kWide ? 4 : 2;
  static constexpr int kFewRows = kWide ? (kGrouped ? 2 : 4) : 1;
  static constexpr int kManyPanels = kThree ? 3 : kWide ? 2 : 1;
  static constexpr int kManyRows = kThree ? 8 : kWide ? (kGrouped ? 6 : 12) : kGrouped ? 3 : 6;
};

// Sizes of tiles of which nearly any number of rows can be made; few where a lone panel is left.
template <int P>
constexpr bool is_tile_size(int rows) {
  return P == 1 ? rows == 1 || rows == 6 || rows == 12 : P == 2 ? rows <= 6 || rows % 2 == 0 : true;
}
template <int P>
constexpr int next_tile_size(int rows) {
  do --rows;
  while (rows > 0 && !is_tile_size<P>(rows));
  return rows;
}

// body(Index<R>, row) for the smallest tile size R from kRows down that holds `rows` rows. Returns
// R.
template <int kRows, int P, class Body>
MOESERVE_INLINE int with_tile_size(int rows, int row, const Body &body) {
  constexpr int kNext = next_tile_size<P>(kRows);
  if constexpr (kNext > 0) {
    if (rows <= kNext) return with_tile_size<kNext, P>(rows, row, body);
  }
  body(Index<kRows>{}, row);
  return kRows;
}

// The same for tiles that together cover all rows; the last may reach beyond. They are of nearly
// equal sizes: a tile of one or two rows takes as long as one of five, because it has too few sums
// to keep the multipliers busy.
template <int kMost, int P, class Body>
MOESERVE_INLINE void for_row_tiles(int num_rows, const Body &body) {
  for (int row = 0; row < num_rows;) {
    const int left = num_rows - row;
    const int num_tiles = (left + kMost - 1) / kMost;
    row += with_tile_size<kMost, P>((left + num_tiles - 1) / num_tiles, row, body);
  }
}

// P panels that come after those P, or null.
inline const std::uint8_t *panels_after(const GemmJob &job, int panel, int P) {
  if (panel + 2 * P <= job.num_panels) return job.panels + (panel + P) * job.layout->panel_bytes;
  return job.num_next >= P ? job.next : nullptr;
}

// What comes after `panels` panels from `first` on, to be asked for in `num_steps` steps.
inline PanelsAhead ahead_of(const GemmJob &job, int first, int panels, std::int64_t num_steps) {
  const std::uint8_t *present = job.panels + first * job.layout->panel_bytes;
  const int left = job.num_panels - first - panels;
  const int most = left > 0 ? left : job.next == nullptr ? 0 : job.num_next;
  const std::uint8_t *begin = left > 0    ? present + panels * job.layout->panel_bytes
                              : most == 0 ? present
                                          : job.next;
  return PanelsAhead(begin, most < panels ? most : panels, panels, job.layout->panel_bytes,
                     num_steps);
}

template <int kRows, int kPanels>
std::int64_t num_tiles(const GemmJob &job) {
  return std::int64_t{(job.num_rows + kRows - 1) / kRows} *
         ((job.num_panels + kPanels - 1) / kPanels);
}

// How often a tile asks for more on its way through its panels.
inline std::int64_t steps_of(const PackedLayout &layout) {
  const int groups = layout.num_groups > 0 ? layout.num_groups : 1;
  const int chunks = (layout.num_chunks + groups - 1) / groups;
  return std::int64_t{groups} * ((chunks + kStepChunks - 1) / kStepChunks);
}

// All rows with P panels at a time, as long as there are so many. Returns the first panel left.
template <class Tile, int kMost, int P>
MOESERVE_INLINE int cover_panels(const GemmJob &job, int panel, int end, RowsAhead &rows_ahead) {
  const int num_tiles = (job.num_rows + kMost - 1) / kMost;
  for (; panel + P <= end; panel += P) {
    PanelsAhead ahead = ahead_of(job, panel, P, num_tiles * steps_of(*job.layout));
    const std::uint8_t *following = panels_after(job, panel, P);
    for_row_tiles<kMost, P>(job.num_rows, [&](auto rows, int row) __attribute__((always_inline)) {
      rows_ahead.step();
      Tile::template run<decltype(rows)::value, P>(Place{job, row, panel, ahead, following});
    });
    if (num_tiles > 1) ahead.template finish<P>();
  }
  return panel;
}

template <class Tile>
void gemm_tiles(const GemmJob &job) {
  using T = Tiles<Tile>;
  constexpr int kMany = T::kManyPanels;
  const int end = job.num_panels;
  int panel = 0;
  RowsAhead rows(job, num_tiles<T::kManyRows, kMany>(job));
  if (job.num_rows <= T::kFewRows) {
    panel = cover_panels<Tile, T::kFewRows, T::kFewPanels>(job, 0, end, rows);
  }
  // Threes and a lone panel are worse than one three less and two pairs.
  const int left = end - panel;
  const bool lone = kMany == 3 && left % kMany == 1 && left > 1;
  panel = cover_panels<Tile, T::kManyRows, kMany>(job, panel, lone ? end - 4 : end, rows);
  if constexpr (kMany > 2) panel = cover_panels<Tile, T::kManyRows, 2>(job, panel, end, rows);
  if constexpr (kMany > 1) cover_panels<Tile, T::kManyRows, 1>(job, panel, end, rows);
}

}  // namespace
