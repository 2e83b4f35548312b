// How rows and panels of a product are cut into tiles.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "gemm_tiles.h"

namespace {

// Tile sizes. Sums take R * P vectors (twice that with groups), and each vector of AVX2 two
// registers. Tiles of few rows take more panels: their time is the reading of weights, and several
// streams keep more of it in flight.
template <bool kGrouped>
struct Tiles {
  static constexpr bool kWide = Vec::kRegisters >= 32;
  static constexpr int kFewPanels = kWide ? 4 : 2;
  static constexpr int kFewRows = kWide ? (kGrouped ? 2 : 4) : 1;
  static constexpr int kManyPanels = kWide ? 2 : 1;
  static constexpr int kManyRows = kWide ? (kGrouped ? 6 : 12) : (kGrouped ? 3 : 6);
};

// Sizes of tiles of which nearly any number of rows can be made; few where a lone panel is left.
template <int P>
constexpr bool is_tile_size(int rows) {
  return P == 1 ? rows == 1 || rows == 6 || rows == 12 : rows <= 6 || rows % 2 == 0;
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
  const int left = job.num_panels - first - panels;
  const std::uint8_t *begin =
      left > 0 ? job.panels + (first + panels) * job.layout->panel_bytes : job.next;
  const int most = left > 0 ? left : job.num_next;
  return PanelsAhead(begin, most < panels ? most : panels, job.layout->panel_bytes, num_steps);
}

template <int kRows, int kPanels>
std::int64_t num_tiles(const GemmJob &job) {
  return std::int64_t{(job.num_rows + kRows - 1) / kRows} *
         ((job.num_panels + kPanels - 1) / kPanels);
}

// All rows with P panels at a time, as long as there are so many. Returns the first panel left.
template <class Tile, int kMost, int P>
MOESERVE_INLINE int cover_panels(const GemmJob &job, int panel, RowsAhead &rows_ahead) {
  const int num_tiles = (job.num_rows + kMost - 1) / kMost;
  for (; panel + P <= job.num_panels; panel += P) {
    PanelsAhead ahead = ahead_of(job, panel, P, std::int64_t{num_tiles} * job.layout->num_chunks);
    const std::uint8_t *following = panels_after(job, panel, P);
    for_row_tiles<kMost, P>(job.num_rows, [&](auto rows, int row) __attribute__((always_inline)) {
      rows_ahead.step();
      Tile::template run<decltype(rows)::value, P>(Place{job, row, panel, ahead, following});
    });
    if (num_tiles > 1) ahead.finish();
  }
  return panel;
}

template <class Tile>
void gemm_tiles(const GemmJob &job) {
  using T = Tiles<Tile::kGrouped>;
  int panel = 0;
  RowsAhead rows(job, num_tiles<T::kManyRows, T::kManyPanels>(job));
  if (job.num_rows <= T::kFewRows) {
    panel = cover_panels<Tile, T::kFewRows, T::kFewPanels>(job, 0, rows);
  }
  panel = cover_panels<Tile, T::kManyRows, T::kManyPanels>(job, panel, rows);
  if constexpr (T::kManyPanels > 1) cover_panels<Tile, T::kManyRows, 1>(job, panel, rows);
}

}  // namespace
