// Attention of one tile: its blocks, the combination of its partitions, its results.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "attention_block.h"
#include "head_kernels.h"

namespace {

constexpr float kLog2E = 1.44269504088896341f;

// Pairs of a tile with all its kv heads: head by head.
inline int all_pairs(const AttentionTile &tile) { return tile.num_heads * tile.num_pairs; }

inline Softmax softmax_at(const Softmax &softmax, const AttentionCall &call, int pair) {
  return {softmax.values + pair * padded(call.value_dim), softmax.largest + pair,
          softmax.weights + pair * kLanes};
}

std::size_t partial_floats(const AttentionCall &call, int num_pairs) {
  return static_cast<std::size_t>(padded(num_pairs)) *
         (static_cast<std::size_t>(padded(call.value_dim)) + 2);
}

// A finished partition in memory of that many floats.
Softmax partial_at(const AttentionCall &call, int num_pairs, float *memory) {
  const auto pairs = static_cast<std::size_t>(padded(num_pairs));
  float *largest = memory + pairs * static_cast<std::size_t>(padded(call.value_dim));
  return {memory, largest, largest + pairs};
}

struct TileMemory {
  float *queries;  // [pairs, padded key_dim]
  float *chunk;
  float *scores;   // of one kv head
  float *factors;  // of one kv head
  Softmax partition;
  Softmax total;
};

// Places in memory for all pairs of a tile, and how much they take; memory may be null.
std::size_t lay_out(const AttentionCall &call, int num_pairs, float *memory, TileMemory *out) {
  const auto pairs = static_cast<std::size_t>(padded(num_pairs));
  const auto key_dim = static_cast<std::size_t>(padded(call.key_dim));
  const auto value_dim = static_cast<std::size_t>(padded(call.value_dim));
  std::size_t used = 0;
  const auto take = [&](std::size_t count) {
    float *place = memory == nullptr ? nullptr : memory + used;
    used += count;
    return place;
  };
  out->chunk = take(kChunk * kChunk);
  out->scores = take(pairs * kBlockKeys);
  out->factors = take(pairs);
  out->queries = take(pairs * key_dim);
  out->partition = {take(pairs * value_dim), take(pairs), take(pairs * kLanes)};
  out->total = {take(pairs * value_dim), take(pairs), take(pairs)};
  return used;
}

std::size_t scratch_floats(const AttentionCall &call, int num_pairs) {
  TileMemory unused;
  return lay_out(call, num_pairs, nullptr, &unused);
}

inline Sight sight_of(const AttentionCall &call, const AttentionTile &tile, int pair) {
  const AttentionSpan &span = *tile.span;
  const std::int64_t row = (tile.first_pair + pair) / call.group_heads;
  const std::int64_t end = span.context_tokens - span.num_rows + row + 1;
  return {call.window == 0 ? 0 : larger<std::int64_t>(0, end - call.window), end};
}

// Queries as floats, times the scale and log2(e).
void load_queries(const AttentionCall &call, const AttentionTile &tile, float *out) {
  const Vec::F factor = Vec::set1(call.scale * kLog2E);
  const auto size = static_cast<std::int64_t>(size_of(call.dtype));
  for (int i = 0; i < all_pairs(tile); ++i, out += padded(call.key_dim)) {
    const std::int64_t pair = tile.first_pair + i % tile.num_pairs;
    const std::int64_t row = tile.span->first_row + pair / call.group_heads;
    const std::int64_t place = row * call.query_strides[0] +
                               (tile.first_head + i / tile.num_pairs) * call.query_strides[1] +
                               pair % call.group_heads * call.query_strides[2];
    const char *from = static_cast<const char *>(call.queries) + place * size;
    for (int d = 0; d < call.key_dim; d += kLanes) {
      const Vec::F x = load_some(call.dtype, from + d * size, call.key_dim - d);
      Vec::store(out + d, Vec::mul(x, factor));
    }
  }
}

// The kv rows of `count` tokens from `token` on, at the tile's first head.
template <class Number>
void find_rows(const AttentionCall &call, const AttentionTile &tile, std::int64_t token, int count,
               const Number **rows) {
  const auto *entries = static_cast<const Number *>(call.entries);
  for (int i = 0; i < count; ++i) {
    const std::int64_t slot = tile.span->kv_slots[token + i];
    rows[i] = entries + (slot * call.num_kv_heads + tile.first_head) * call.width;
  }
}

// All heads of the tile in the rows of its next block, spread over the products of this one.
template <Dtype kDtype>
Ahead next_block(const AttentionCall &call, const AttentionTile &tile, const BlockView &view,
                 const typename NumberOf<kDtype>::Type *const *rows, int num_rows) {
  const auto *begin = reinterpret_cast<const char *const *>(rows);
  const int head_bytes = call.width * static_cast<int>(size_of(kDtype));
  const int lines = kBlockKeys * (head_bytes / 64 + 1);
  const int chunks = (call.key_dim + kChunk - 1) / kChunk + (call.value_dim + kChunk - 1) / kChunk;
  const int steps = view.num_strips * chunks;
  return {begin, begin + num_rows, tile.num_heads * head_bytes, lines / steps + 1};
}

// All blocks of one partition.
template <Dtype kDtype>
void attend_partition(const AttentionCall &call, const AttentionTile &tile, const Sight *sights,
                      std::int64_t start, const TileMemory &memory) {
  using Number = typename NumberOf<kDtype>::Type;
  const Softmax &softmax = memory.partition;
  const auto pairs = static_cast<std::size_t>(all_pairs(tile));
  const auto value_dim = static_cast<std::size_t>(padded(call.value_dim));
  __builtin_memset(softmax.values, 0, sizeof(float) * pairs * value_dim);
  __builtin_memset(softmax.weights, 0, sizeof(float) * pairs * kLanes);
  for (std::size_t pair = 0; pair < pairs; ++pair) softmax.largest[pair] = -kInfinity;

  const std::int64_t seen_end = sights[tile.num_pairs - 1].end;
  const std::int64_t first = larger(start, sights[0].first / kBlockKeys * kBlockKeys);
  const std::int64_t end = smaller(start + kPartitionKeys, seen_end);
  const std::int64_t fetch_end = smaller(tile.end_partition * kPartitionKeys, seen_end);
  for (std::int64_t key = first; key < end; key += kBlockKeys) {
    const BlockView view(key, sights, tile.num_pairs);
    const Number *rows[kBlockKeys];
    find_rows(call, tile, key, view.num_keys, rows);
    // Lanes beyond the last key repeat it, so that they read memory that is there.
    for (int i = view.num_keys; i < view.end_vec * kLanes; ++i) rows[i] = rows[view.num_keys - 1];

    const Number *next[kBlockKeys];
    const auto num_next = static_cast<int>(
        larger<std::int64_t>(0, smaller<std::int64_t>(kBlockKeys, fetch_end - key - kBlockKeys)));
    find_rows(call, tile, key + kBlockKeys, num_next, next);
    Ahead ahead = next_block<kDtype>(call, tile, view, next, num_next);
    for (int head = 0; head < tile.num_heads; ++head) {
      const int pair = head * tile.num_pairs;
      const BlockMemory block_memory = {memory.queries + pair * padded(call.key_dim), memory.chunk,
                                        memory.scores, memory.factors,
                                        softmax_at(softmax, call, pair)};
      Block<kDtype>{call, view, rows, block_memory, ahead}.attend();
      for (int i = 0; i < view.end_vec * kLanes; ++i) rows[i] += call.width;
    }
  }
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    softmax.weights[pair] = Vec::sum(Vec::load(softmax.weights + pair * kLanes));
  }
}

// Adds a finished partition to a pair's total, which it starts where it is the first the pair sees.
void fold(const AttentionCall &call, int pair, const Sight &sight, std::int64_t partition,
          const Softmax &part, const Softmax &total) {
  const std::int64_t start = partition * kPartitionKeys;
  if (sight.end <= start || sight.first >= start + kPartitionKeys) return;
  const int stride = padded(call.value_dim);
  const float *from = part.values + pair * stride;
  float *to = total.values + pair * stride;
  if (sight.first >= start) {
    total.largest[pair] = part.largest[pair];
    total.weights[pair] = part.weights[pair];
    for (int d = 0; d < stride; d += kLanes) Vec::store(to + d, Vec::load(from + d));
    return;
  }
  const float largest = larger(total.largest[pair], part.largest[pair]);
  const Vec::F old = exp2_of(Vec::set1(total.largest[pair] - largest));
  const Vec::F own = exp2_of(Vec::set1(part.largest[pair] - largest));
  total.largest[pair] = largest;
  float lanes[kLanes];
  Vec::store(lanes, Vec::fma(Vec::set1(part.weights[pair]), own,
                             Vec::mul(Vec::set1(total.weights[pair]), old)));
  total.weights[pair] = lanes[0];
  for (int d = 0; d < stride; d += kLanes) {
    const Vec::F kept = Vec::mul(Vec::load(to + d), old);
    Vec::store(to + d, Vec::fma(Vec::load(from + d), own, kept));
  }
}

void write_results(const AttentionCall &call, const AttentionTile &tile, const Softmax &total) {
  const auto size = static_cast<std::int64_t>(size_of(call.dtype));
  const float *values = total.values;
  for (int i = 0; i < all_pairs(tile); ++i, values += padded(call.value_dim)) {
    const std::int64_t pair = tile.first_pair + i % tile.num_pairs;
    const std::int64_t row = tile.span->first_row + pair / call.group_heads;
    const std::int64_t head =
        (tile.first_head + i / tile.num_pairs) * call.group_heads + pair % call.group_heads;
    float kept = 1.0f, weight = total.weights[i];
    if (call.sinks != nullptr) {
      const float sink = call.sinks[head] * kLog2E;
      const float largest = larger(sink, total.largest[i]);
      kept = exp2_of(total.largest[i] - largest);
      weight *= kept;
      if (sink > -kInfinity) weight += exp2_of(sink - largest);
    }
    const Vec::F factor = Vec::set1(kept / weight);
    char *out = static_cast<char *>(call.out) +
                (row * call.num_kv_heads * call.group_heads + head) * call.value_dim * size;
    for (int d = 0; d < call.value_dim; d += kLanes) {
      store_some(call.dtype, out + d * size, Vec::mul(Vec::load(values + d), factor),
                 call.value_dim - d);
    }
  }
}

template <Dtype kDtype>
void attend_tile(const AttentionCall &call, const AttentionTile &tile, const TileMemory &memory) {
  Sight sights[kMaxTilePairs];
  for (int pair = 0; pair < tile.num_pairs; ++pair) sights[pair] = sight_of(call, tile, pair);
  load_queries(call, tile, memory.queries);
  float *partial = tile.partials;
  const Softmax &part = memory.partition;
  for (std::int64_t p = tile.first_partition; p < tile.end_partition; ++p) {
    attend_partition<kDtype>(call, tile, sights, p * kPartitionKeys, memory);
    if (partial == nullptr) {
      for (int i = 0; i < all_pairs(tile); ++i) {
        fold(call, i, sights[i % tile.num_pairs], p, part, memory.total);
      }
      continue;
    }
    const Softmax out = partial_at(call, all_pairs(tile), partial);
    const auto bytes = sizeof(float) * static_cast<std::size_t>(all_pairs(tile));
    __builtin_memcpy(out.values, part.values,
                     bytes * static_cast<std::size_t>(padded(call.value_dim)));
    __builtin_memcpy(out.largest, part.largest, bytes);
    __builtin_memcpy(out.weights, part.weights, bytes);
    partial += partial_floats(call, all_pairs(tile));
  }
  if (partial == nullptr) write_results(call, tile, memory.total);
}

void attend_any(const AttentionCall &call, const AttentionTile &tile, float *scratch) {
  TileMemory memory;
  lay_out(call, all_pairs(tile), scratch, &memory);
  switch (call.dtype) {
    case Dtype::kF32:
      return attend_tile<Dtype::kF32>(call, tile, memory);
    case Dtype::kBF16:
      return attend_tile<Dtype::kBF16>(call, tile, memory);
    case Dtype::kF16:
      return attend_tile<Dtype::kF16>(call, tile, memory);
  }
}

void combine(const AttentionCall &call, const AttentionTile &tile, float *scratch) {
  TileMemory memory;
  const int pairs = all_pairs(tile);
  lay_out(call, pairs, scratch, &memory);
  float *partial = tile.partials;
  for (std::int64_t p = tile.first_partition; p < tile.end_partition; ++p) {
    const Softmax part = partial_at(call, pairs, partial);
    for (int i = 0; i < pairs; ++i) {
      fold(call, i, sight_of(call, tile, i % tile.num_pairs), p, part, memory.total);
    }
    partial += partial_floats(call, pairs);
  }
  write_results(call, tile, memory.total);
}

constexpr moeserve::AttentionKernels make_attention_table() {
  moeserve::AttentionKernels table = {};
  table.scratch_floats = scratch_floats;
  table.partial_floats = partial_floats;
  table.attend = attend_any;
  table.combine = combine;
  table.prepare_grouped = prepare_grouped;
  table.prepare_latent = prepare_latent;
  return table;
}

}  // namespace
