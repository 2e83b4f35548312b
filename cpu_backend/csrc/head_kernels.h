// What happens to the heads of a row between their projection and attention: norm, clipping,
// rotation, the way into the kv pool. All of it in float32, rounded once.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "attention_product.h"

namespace {

using moeserve::GroupedHeads;
using moeserve::LatentHeads;
using moeserve::RowTurns;

// Numbers of a head as floats; a multiple of 16 of them is written, with zeros behind.
template <Dtype kDtype>
inline void load_head(const void *p, int count, float *out) {
  const auto size = static_cast<std::int64_t>(size_of(kDtype));
  for (int d = 0; d < count; d += kLanes) {
    Vec::store(out + d, load_some(kDtype, static_cast<const char *>(p) + d * size, count - d));
  }
}

template <Dtype kDtype>
inline void store_head(const float *x, void *p, int count) {
  const auto size = static_cast<std::int64_t>(size_of(kDtype));
  for (int d = 0; d < count; d += kLanes) {
    store_some(kDtype, static_cast<char *>(p) + d * size, Vec::load(x + d), count - d);
  }
}

inline Vec::F add_squares(const float *x, int count, Vec::F sum) {
  for (int d = 0; d < count; d += kLanes) {
    const Vec::F v = Vec::load(x + d);
    sum = Vec::fma(v, v, sum);
  }
  return sum;
}

inline float inverse_root(Vec::F squares, int count, float eps) {
  return 1.0f / sqrtf(Vec::sum(squares) / static_cast<float>(count) + eps);
}

inline void scale_head(float *x, int count, float factor, const float *weight) {
  const Vec::F all = Vec::set1(factor);
  for (int d = 0; d < count; d += kLanes) {
    const Vec::F w = load_some(Dtype::kF32, weight + d, count - d);
    Vec::store(x + d, Vec::mul(Vec::mul(Vec::load(x + d), all), w));
  }
}

// NaN stays NaN.
inline void clip_head(float *x, int count, float limit) {
  const Vec::F high = Vec::set1(limit), low = Vec::set1(-limit);
  for (int d = 0; d < count; d += kLanes) {
    Vec::store(x + d, Vec::min(high, Vec::max(low, Vec::load(x + d))));
  }
}

// The first turns.dim numbers of x turn; up to 15 behind padded(turns.dim) are read.
inline void turn_head(const RowTurns &turns, std::int64_t row, float *x) {
  const int half = turns.dim / 2;
  const float *cosine = turns.cosine + row * turns.dim, *sine = turns.sine + row * turns.dim;
  for (int d = 0; d < half; d += kLanes) {
    const int count = half - d;
    const auto load = [&](const float *p) { return load_some(Dtype::kF32, p, count); };
    const auto turned = [&](Vec::F own, Vec::F other, int i) {
      return Vec::fma(other, load(sine + i), Vec::mul(own, load(cosine + i)));
    };
    const Vec::F first = load(x + d), second = load(x + half + d);
    store_some(Dtype::kF32, x + d, turned(first, second, d), count);
    store_some(Dtype::kF32, x + half + d, turned(second, first, half + d), count);
  }
}

// Factors of the norms of all queries and of all keys together.
template <Dtype kDtype>
inline void norm_together(const GroupedHeads &call, const char *row, float *head, float *queries,
                          float *keys) {
  const auto size = static_cast<std::int64_t>(size_of(call.dtype));
  Vec::F query_squares = Vec::zero(), key_squares = Vec::zero();
  for (int h = 0; h < call.num_kv_heads; ++h) {
    for (int i = 0; i <= call.group_heads; ++i) {
      const std::int64_t place = (std::int64_t{h} * (call.group_heads + 2) + i) * call.head_dim;
      load_head<kDtype>(row + place * size, call.head_dim, head);
      Vec::F &squares = i < call.group_heads ? query_squares : key_squares;
      squares = add_squares(head, call.head_dim, squares);
    }
  }
  const int num_keys = call.num_kv_heads * call.head_dim;
  *queries = inverse_root(query_squares, num_keys * call.group_heads, call.norm_eps);
  *keys = inverse_root(key_squares, num_keys, call.norm_eps);
}

// memory: padded(head_dim) floats, and 16 more.
template <Dtype kDtype>
void prepare_grouped_as(const GroupedHeads &call, std::int64_t row, float *memory) {
  const int group = call.group_heads, dim = call.head_dim;
  const auto size = static_cast<std::int64_t>(size_of(call.dtype));
  float *head = memory;
  char *first = static_cast<char *>(call.rows) + row * call.row_stride * size;
  char *entry =
      static_cast<char *>(call.entries) + call.slots[row] * call.num_kv_heads * 2 * dim * size;
  float of_queries = 0.0f, of_keys = 0.0f;
  const bool together = call.norm_weight != nullptr && call.norm_together;
  if (together) norm_together<kDtype>(call, first, head, &of_queries, &of_keys);
  for (int h = 0; h < call.num_kv_heads; ++h) {
    for (int i = 0; i < group + 2; ++i) {
      char *place = first + (std::int64_t{h} * (group + 2) + i) * dim * size;
      load_head<kDtype>(place, dim, head);
      const bool value = i == group + 1;
      if (call.norm_weight != nullptr && !value) {
        const float factor =
            !together    ? inverse_root(add_squares(head, dim, Vec::zero()), dim, call.norm_eps)
            : i == group ? of_keys
                         : of_queries;
        scale_head(head, dim, factor, call.norm_weight + h * call.norm_stride + i * dim);
      }
      if (call.clip < kInfinity) clip_head(head, dim, call.clip);
      if (!value) turn_head(call.turns, row, head);
      if (i >= group) place = entry + (2 * h + (value ? 1 : 0)) * dim * size;
      store_head<kDtype>(head, place, dim);
    }
  }
}

void prepare_grouped(const GroupedHeads &call, std::int64_t row, float *memory) {
  with_type(call.dtype,
            [&](auto type) { prepare_grouped_as<decltype(type)::value>(call, row, memory); });
}

// memory: padded(rank) + padded(turns.dim) floats, and 16 more.
template <Dtype kDtype>
void prepare_latent_as(const LatentHeads &call, std::int64_t row, float *memory) {
  const int rank = call.rank, turned = call.turns.dim;
  const auto size = static_cast<std::int64_t>(size_of(call.dtype));
  float *latent = memory, *head = memory + padded(rank);
  const char *from = static_cast<const char *>(call.latents) + row * call.latent_stride * size;
  char *entry = static_cast<char *>(call.entries) + call.slots[row] * (rank + turned) * size;
  load_head<kDtype>(from, rank, latent);
  scale_head(latent, rank,
             inverse_root(add_squares(latent, rank, Vec::zero()), rank, call.norm_eps),
             call.norm_weight);
  store_head<kDtype>(latent, entry, rank);
  load_head<kDtype>(from + rank * size, turned, head);
  turn_head(call.turns, row, head);
  store_head<kDtype>(head, entry + rank * size, turned);
  char *place = static_cast<char *>(call.rotated) + row * call.rotated_strides[0] * size;
  for (int h = 0; h < call.num_heads; ++h, place += call.rotated_strides[1] * size) {
    load_head<kDtype>(place, turned, head);
    turn_head(call.turns, row, head);
    store_head<kDtype>(head, place, turned);
  }
}

void prepare_latent(const LatentHeads &call, std::int64_t row, float *memory) {
  with_type(call.dtype,
            [&](auto type) { prepare_latent_as<decltype(type)::value>(call, row, memory); });
}

}  // namespace
