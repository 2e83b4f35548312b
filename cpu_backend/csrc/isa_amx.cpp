// AMX tiles for bf16 and int8 weights; everything else as on AVX-512 with VNNI and BF16.
//
// A tile of weights is 16 chunks of a panel as they lie in memory: 16 pairs of inputs (int8: quads)
// of 16 outputs. A tile of rows is 16 rows of the same 64 bytes. Every sum runs over the inputs in
// order in a tile of its own row, so that neighbours change nothing; bf16 takes tiles even for a
// single row, because their rounding is not that of the vector instructions. Sums of int8 are
// exact, so few rows may go the other way, which costs less to set up.
#include "kernels.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define MOESERVE_ATTENTION_ELSEWHERE  // see isa_avx512_vnni.cpp
#include "vec_avx512.h"
// The table's templates need the Vec above.
#include "kernel_table.h"

namespace {

constexpr int kTileChunks = 16;
constexpr int kTilePanels = 4;
constexpr std::size_t kTileBytes = kTileChunks * kChunkBytes;

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// Tiles 0-3: sums of four panels. 4: rows. 5: weights.
void configure(int num_rows) {
  TileConfig config;
  for (int tile = 0; tile < 6; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<std::uint8_t>(tile == 5 ? kTileChunks : num_rows);
  }
  _tile_loadconfig(&config);
}

// sums[kSum] += rows (4) times weights (5). The intrinsics are macros that want plain digits.
template <bool kInt8, int kSum>
MOESERVE_INLINE void multiply() {
  static_assert(kSum < kTilePanels);
  if constexpr (kInt8) {
    if constexpr (kSum == 0) _tile_dpbsud(0, 4, 5);
    if constexpr (kSum == 1) _tile_dpbsud(1, 4, 5);
    if constexpr (kSum == 2) _tile_dpbsud(2, 4, 5);
    if constexpr (kSum == 3) _tile_dpbsud(3, 4, 5);
  } else {
    if constexpr (kSum == 0) _tile_dpbf16ps(0, 4, 5);
    if constexpr (kSum == 1) _tile_dpbf16ps(1, 4, 5);
    if constexpr (kSum == 2) _tile_dpbf16ps(2, 4, 5);
    if constexpr (kSum == 3) _tile_dpbf16ps(3, 4, 5);
  }
}

// Sums of up to 16 rows and 4 panels into sums[panel][row][16]. The weights behind the last whole
// tile come padded with zeros.
template <bool kInt8>
void multiply_tiles(const GemmJob &job, int first_row, int first_panel, int num_panels,
                    std::int32_t (&sums)[kTilePanels][16][kPanelOutputs]) {
  const PackedLayout &layout = *job.layout;
  const std::size_t row_bytes = job.row_format->data_bytes;
  const std::uint8_t *rows = job.rows.data + first_row * row_bytes;
  const std::int32_t *ids = job.row_ids == nullptr ? nullptr : job.row_ids + first_row;
  const int num_rows = job.num_rows - first_row < 16 ? job.num_rows - first_row : 16;
  alignas(64) std::uint8_t gathered[16][kChunkBytes];  // a tile wants rows at equal distances
  const std::uint8_t *panel = job.panels + first_panel * layout.panel_bytes;
  const int whole = layout.num_chunks / kTileChunks, rest = layout.num_chunks % kTileChunks;
  alignas(64) std::uint8_t padded[kTilePanels][kTileBytes] = {};
  for (int p = 0; p < num_panels && rest > 0; ++p) {
    __builtin_memcpy(padded[p], panel + p * layout.panel_bytes + whole * kTileBytes,
                     rest * kChunkBytes);
  }
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int t = 0; t < whole + (rest > 0 ? 1 : 0); ++t) {
    if (ids == nullptr) {
      _tile_loadd(4, rows + t * kChunkBytes, row_bytes);
    } else {
      for (int r = 0; r < num_rows; ++r) {
        Vec::store64(gathered[r],
                     Vec::load64(job.rows.data + ids[r] * row_bytes + t * kChunkBytes));
      }
      _tile_loadd(4, gathered, kChunkBytes);
    }
    const auto weights = [&](int p) __attribute__((always_inline)) {
      return t < whole ? panel + p * layout.panel_bytes + t * kTileBytes : padded[p];
    };
    _tile_loadd(5, weights(0), kChunkBytes);
    multiply<kInt8, 0>();
    if (num_panels > 1) {
      _tile_loadd(5, weights(1), kChunkBytes);
      multiply<kInt8, 1>();
    }
    if (num_panels > 2) {
      _tile_loadd(5, weights(2), kChunkBytes);
      multiply<kInt8, 2>();
    }
    if (num_panels > 3) {
      _tile_loadd(5, weights(3), kChunkBytes);
      multiply<kInt8, 3>();
    }
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
}

template <bool kInt8>
void tile_gemm(const GemmJob &job) {
  const PackedLayout &layout = *job.layout;
  alignas(64) std::int32_t sums[kTilePanels][16][kPanelOutputs];
  for (int row = 0; row < job.num_rows; row += 16) {
    const int num_rows = job.num_rows - row < 16 ? job.num_rows - row : 16;
    configure(num_rows);
    for (int first = 0; first < job.num_panels; first += kTilePanels) {
      const int left = job.num_panels - first;
      const int num_panels = left < kTilePanels ? left : kTilePanels;
      multiply_tiles<kInt8>(job, row, first, num_panels, sums);
      for (int p = 0; p < num_panels; ++p) {
        for (int r = 0; r < num_rows; ++r) {
          float *out = job.out + (row + r) * job.out_stride + (first + p) * kPanelOutputs;
          const auto *sum = reinterpret_cast<const std::uint8_t *>(sums[p][r]);
          if constexpr (!kInt8) {
            __builtin_memcpy(out, sum, 64);
            continue;
          }
          const int source = job.row_ids == nullptr ? row + r : job.row_ids[row + r];
          // As IntTile: what 128 instead of zero adds up to, the output's scale, the row's scale.
          const Vec::I exact =
              _mm512_add_epi32(Vec::load64(sum), Vec::iset1(job.rows.sums[source]));
          const std::uint8_t *panel = job.panels + (first + p) * layout.panel_bytes;
          const Vec::F scaled =
              Vec::mul(Vec::to_float(exact), load_scale<Format::kInt8>(layout, panel, 0));
          Vec::store(out, Vec::mul(scaled, Vec::set1(job.rows.scales[source])));
        }
      }
    }
  }
  _tile_release();
}

constexpr int kInt8TileRows = 5;

void amx_gemm(const GemmJob &job) {
  const bool integer = row_form(*job.layout) == RowForm::kInt8;
  if (job.layout->format == Format::kBF16) return tile_gemm<false>(job);
  if (job.layout->format == Format::kInt8 && integer && job.num_rows >= kInt8TileRows) {
    return tile_gemm<true>(job);
  }
  gemm(job);
}

int amx_tile_panels(const PackedLayout &layout) {
  const bool tiles = layout.format == Format::kBF16 ||
                     (layout.format == Format::kInt8 && row_form(layout) == RowForm::kInt8);
  return tiles ? kTilePanels : tile_panels(layout);
}

moeserve::Kernels make_amx_table() {
  moeserve::Kernels table = make_table("amx");
  table.gemm = amx_gemm;
  table.tile_panels = amx_tile_panels;
  table.attention = moeserve::avx512_kernels()->attention;
  return table;
}

}  // namespace

namespace moeserve {

const Kernels *amx_kernels() {
  static const Kernels kTable = make_amx_table();
  return &kTable;
}

}  // namespace moeserve
#else
namespace moeserve {

const Kernels *amx_kernels() { return nullptr; }

}  // namespace moeserve
#endif
