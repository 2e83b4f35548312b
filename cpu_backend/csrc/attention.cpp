#include "attention.h"

#include <algorithm>
#include <mutex>

#include "runtime.h"

namespace moeserve {
namespace {

// Enough tiles that threads end together although some are slow.
constexpr std::int64_t kTilesPerThread = 4;
// Below that many pairs a tile computes less than it costs to bring its kv in again.
constexpr std::int64_t kMinTilePairs = 24;
// What a tile with wide heads may take of a core's second-level cache.
constexpr std::int64_t kTileFloats = 128 * 1024;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t tile_pairs(const AttentionCall &call, const std::vector<AttentionSpan> &spans,
                        int num_threads) {
  std::int64_t num_pairs = 0;
  for (const auto &span : spans) num_pairs += span.num_rows * call.group_heads * call.num_kv_heads;
  const std::int64_t fits = kTileFloats / (call.key_dim + 2 * call.value_dim);
  const std::int64_t most = std::clamp<std::int64_t>(fits, kMinTilePairs, kMaxTilePairs);
  return std::clamp(ceil_div(num_pairs, kTilesPerThread * num_threads), kMinTilePairs, most);
}

// The partitions that the pairs of a tile see.
void find_partitions(const AttentionCall &call, AttentionTile &tile) {
  const AttentionSpan &span = *tile.span;
  const std::int64_t before = span.context_tokens - span.num_rows;
  const std::int64_t oldest = before + tile.first_pair / call.group_heads;
  const std::int64_t newest = before + (tile.first_pair + tile.num_pairs - 1) / call.group_heads;
  const std::int64_t first =
      call.window == 0 ? 0 : std::max<std::int64_t>(0, oldest + 1 - call.window);
  tile.first_partition = first / kPartitionKeys;
  tile.end_partition = newest / kPartitionKeys + 1;
}

// Tiles that cover all pairs, the longest contexts of a span first.
std::vector<AttentionTile> make_tiles(const AttentionCall &call,
                                      const std::vector<AttentionSpan> &spans, int num_threads) {
  const std::int64_t most = tile_pairs(call, spans, num_threads);
  std::vector<AttentionTile> tiles;
  for (const auto &span : spans) {
    const std::int64_t num_pairs = span.num_rows * call.group_heads;
    const std::int64_t count = ceil_div(num_pairs, most);
    for (std::int64_t i = count - 1; i >= 0; --i) {
      const std::int64_t first = i * num_pairs / count;
      const std::int64_t end = (i + 1) * num_pairs / count;
      // As few tiles as have room for all heads, and in each the same number of them.
      const auto room = std::clamp<std::int64_t>(most / (end - first), 1, call.num_kv_heads);
      const auto heads =
          static_cast<int>(ceil_div(call.num_kv_heads, ceil_div(call.num_kv_heads, room)));
      for (int head = 0; head < call.num_kv_heads; head += heads) {
        AttentionTile tile = {.span = &span,
                              .first_head = head,
                              .num_heads = std::min(heads, call.num_kv_heads - head),
                              .first_pair = first,
                              .num_pairs = static_cast<int>(end - first),
                              .first_partition = 0,
                              .end_partition = 0,
                              .partials = nullptr};
        find_partitions(call, tile);
        tiles.push_back(tile);
      }
    }
  }
  return tiles;
}

// The same work in smaller pieces: consecutive partitions of one tile each.
std::vector<AttentionTile> split_tiles(const std::vector<AttentionTile> &tiles,
                                       std::int64_t num_pieces,
                                       const std::vector<std::size_t> &partial_floats) {
  std::int64_t num_partitions = 0;
  for (const auto &tile : tiles) num_partitions += tile.end_partition - tile.first_partition;
  const std::int64_t step = std::max<std::int64_t>(1, num_partitions / num_pieces);
  std::vector<AttentionTile> pieces;
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    AttentionTile piece = tiles[i];
    for (std::int64_t p = tiles[i].first_partition; p < tiles[i].end_partition; p += step) {
      piece.first_partition = p;
      piece.end_partition = std::min(p + step, tiles[i].end_partition);
      piece.partials = tiles[i].partials +
                       static_cast<std::size_t>(p - tiles[i].first_partition) * partial_floats[i];
      pieces.push_back(piece);
    }
  }
  return pieces;
}

// Below that many numbers, waking threads costs more than they save.
constexpr std::int64_t kWorthSharing = 1 << 15;

template <class Row>
void for_rows(Runtime &runtime, std::int64_t num_rows, std::int64_t row_numbers,
              std::size_t row_floats, const Row &body) {
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  auto &per_thread = runtime.workspace.per_thread;
  for (auto &scratch : per_thread) scratch.take<float>(row_floats);
  if (num_rows * row_numbers < kWorthSharing) {
    float *memory = per_thread[0].take<float>(row_floats);
    for (std::int64_t row = 0; row < num_rows; ++row) body(row, memory);
    return;
  }
  runtime.pool.run([&](Worker &worker) {
    float *memory = per_thread[static_cast<std::size_t>(worker.index())].take<float>(row_floats);
    worker.share_rows(num_rows, [&](std::int64_t row) { body(row, memory); });
  });
}

}  // namespace

void prepare(Runtime &runtime, const GroupedHeads &call, std::int64_t num_rows) {
  const std::int64_t numbers =
      std::int64_t{call.num_kv_heads} * (call.group_heads + 2) * call.head_dim;
  for_rows(runtime, num_rows, numbers, static_cast<std::size_t>(4 * call.head_dim + 64),
           [&](std::int64_t row, float *memory) {
             runtime.kernels.attention.prepare_grouped(call, row, memory);
           });
}

void prepare(Runtime &runtime, const LatentHeads &call, std::int64_t num_rows) {
  const std::int64_t numbers = call.rank + std::int64_t{call.num_heads + 1} * call.turns.dim;
  for_rows(runtime, num_rows, numbers,
           static_cast<std::size_t>(4 * (call.rank + call.turns.dim) + 64),
           [&](std::int64_t row, float *memory) {
             runtime.kernels.attention.prepare_latent(call, row, memory);
           });
}

void attend(Runtime &runtime, const AttentionCall &call, const std::vector<AttentionSpan> &spans) {
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  const AttentionKernels &kernels = runtime.kernels.attention;
  const int num_threads = runtime.pool.num_threads();
  std::vector<AttentionTile> tiles = make_tiles(call, spans, num_threads);

  int most_pairs = 0;
  for (const auto &tile : tiles) most_pairs = std::max(most_pairs, tile.num_heads * tile.num_pairs);
  const std::size_t scratch_floats = kernels.scratch_floats(call, most_pairs);
  for (auto &scratch : runtime.workspace.per_thread) scratch.take<float>(scratch_floats);
  const auto memory_of = [&](const Worker &worker) {
    auto &scratch = runtime.workspace.per_thread[static_cast<std::size_t>(worker.index())];
    return scratch.take<float>(scratch_floats);
  };

  const std::int64_t enough = kTilesPerThread * num_threads;
  const bool splits = std::any_of(tiles.begin(), tiles.end(), [](const AttentionTile &tile) {
    return tile.end_partition - tile.first_partition > 1;
  });
  if (num_threads == 1 || !splits || static_cast<std::int64_t>(tiles.size()) >= enough) {
    runtime.pool.run([&](Worker &worker) {
      float *memory = memory_of(worker);
      worker.share(static_cast<std::int64_t>(tiles.size()), [&](std::int64_t item) {
        kernels.attend(call, tiles[static_cast<std::size_t>(item)], memory);
      });
    });
    return;
  }

  std::vector<std::size_t> partial_floats;
  std::size_t all_floats = 0;
  for (const auto &tile : tiles) {
    const auto count = static_cast<std::size_t>(tile.end_partition - tile.first_partition);
    partial_floats.push_back(kernels.partial_floats(call, tile.num_heads * tile.num_pairs));
    all_floats += count * partial_floats.back();
  }
  float *partials = runtime.workspace.sums.take<float>(all_floats);
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    const auto count = static_cast<std::size_t>(tiles[i].end_partition - tiles[i].first_partition);
    tiles[i].partials = partials;
    partials += count * partial_floats[i];
  }
  const std::vector<AttentionTile> pieces = split_tiles(tiles, enough, partial_floats);
  runtime.pool.run([&](Worker &worker) {
    float *memory = memory_of(worker);
    worker.share(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t item) {
      kernels.attend(call, pieces[static_cast<std::size_t>(item)], memory);
    });
    worker.share(static_cast<std::int64_t>(tiles.size()), [&](std::int64_t item) {
      kernels.combine(call, tiles[static_cast<std::size_t>(item)], memory);
    });
  });
}

}  // namespace moeserve
