// One block of keys with all rows of a tile: scores, running softmax, mixture of values.
//
// Keys lie in lanes for the scores and value dimensions for the mixture, so both products are the
// same loop: a few rows of broadcast numbers times a few vectors, all sums in registers. Keys and
// values are widened (and keys transposed) once for all rows, a chunk at a time: chunks stay in the
// first-level cache, and so does little else. Meanwhile the kv of the next block is on its way.
// Scores are in units of log2, so that exp is exp2.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "attention_product.h"
#include "attention_transpose.h"

namespace {

using moeserve::AttentionCall;
using moeserve::AttentionSpan;
using moeserve::AttentionTile;
using moeserve::kMaxTilePairs;
using moeserve::kPartitionKeys;

// The running softmax of some pairs: values are sums of 2^(score - largest) * value, weights the
// same without the value, in 16 parts until the partition ends.
struct Softmax {
  float *values;   // [pairs, padded value_dim]
  float *largest;  // [pairs]
  float *weights;  // [pairs, 16]; of a finished partition, [pairs]
};

// What a block is computed with, of one kv head.
struct BlockMemory {
  const float *queries;  // [pairs, padded key_dim], times the scale and log2(e)
  float *chunk;          // [kChunk, kChunk]: part of the keys or values as floats
  float *scores;         // [pairs, kBlockKeys]
  float *factors;        // [pairs]: how much of the sums before this block remains
  Softmax softmax;
};

// Tokens that a pair sees.
struct Sight {
  std::int64_t first;
  std::int64_t end;
};

// Consecutive pairs that are computed together, and the keys of a block that all of them see.
struct Strip {
  int first_pair;
  int num_pairs;
  int first_key;
  int end_key;
  bool alike;  // no pair sees more than that
};

// The keys of a block as the pairs of a tile see them; the same for all kv heads.
struct BlockView {
  int num_pairs;
  int num_keys;   // of the block, that some pair sees
  int first_vec;  // of the vectors of keys that some pair sees
  int end_vec;
  int num_strips;
  int first_key[kMaxTilePairs];  // that a pair sees; from 0 to 0 where it sees none
  int end_key[kMaxTilePairs];
  Strip strips[kMaxTilePairs];

  BlockView(std::int64_t start, const Sight *sights, int num_pairs) : num_pairs(num_pairs) {
    const Sight &oldest = sights[0], &newest = sights[num_pairs - 1];
    num_keys = static_cast<int>(smaller<std::int64_t>(kBlockKeys, newest.end - start));
    first_vec = static_cast<int>(larger<std::int64_t>(0, oldest.first - start)) / kLanes;
    end_vec = padded(num_keys) / kLanes;
    num_strips = (num_pairs + kStripPairs - 1) / kStripPairs;
    const bool whole = oldest.end >= start + kBlockKeys && newest.first <= start;
    for (int pair = 0; pair < num_pairs; ++pair) {
      first_key[pair] = 0;
      end_key[pair] = kBlockKeys;
      if (!whole) look(pair, start, sights[pair]);
    }
    for (int i = 0; i < num_strips; ++i) strips[i] = strip(i, whole);
  }

 private:
  void look(int pair, std::int64_t start, const Sight &sight) {
    const std::int64_t first = larger<std::int64_t>(0, sight.first - start);
    const std::int64_t end = smaller<std::int64_t>(kBlockKeys, sight.end - start);
    first_key[pair] = first < end ? static_cast<int>(first) : 0;
    end_key[pair] = first < end ? static_cast<int>(end) : 0;
  }

  Strip strip(int index, bool whole) const {
    const int first = index * num_pairs / num_strips;
    const int end = (index + 1) * num_pairs / num_strips;
    Strip s = {first, end - first, first_key[first], end_key[first], true};
    for (int pair = first + 1; pair < end && !whole; ++pair) {
      s.alike = s.alike && first_key[pair] == s.first_key && end_key[pair] == s.end_key;
      s.first_key = larger(s.first_key, first_key[pair]);
      s.end_key = smaller(s.end_key, end_key[pair]);
    }
    s.end_key = larger(s.end_key, s.first_key);
    return s;
  }
};

template <Dtype kDtype>
struct NumberOf {
  using Type = std::uint16_t;
};
template <>
struct NumberOf<Dtype::kF32> {
  using Type = float;
};

// One block of one kv head.
template <Dtype kDtype>
struct Block {
  using Number = typename NumberOf<kDtype>::Type;

  const AttentionCall &call;
  const BlockView &view;
  const Number *const *rows;  // [kBlockKeys], of kv
  const BlockMemory &memory;
  Ahead &ahead;

  void attend() const {
    for (int d = 0; d < call.key_dim; d += kChunk) {
      const int depth = smaller(kChunk, call.key_dim - d);
      gather_keys(d, depth);
      score(d, depth);
    }
    soften();
    for (int d = 0; d < call.value_dim; d += kChunk) {
      const int count = smaller(kChunk, call.value_dim - d);
      gather_values(d, count);
      mix(d, padded(count) / kLanes);
    }
  }

 private:
  // Numbers d.. of the keys into lanes: chunk[number][key].
  void gather_keys(int d, int depth) const {
    constexpr int kWordNumbers = kDtype == Dtype::kBF16 ? 2 : 1;
    constexpr int kStep = kLanes * kWordNumbers;
    for (int vec = view.first_vec; vec < view.end_vec; ++vec) {
      for (int i = 0; i < depth; i += kStep) {
        const void *words[kLanes];
        alignas(64) char copies[kLanes][64];
        const int count = smaller(kStep, depth - i);
        for (int lane = 0; lane < kLanes; ++lane) {
          const Number *row = rows[vec * kLanes + lane] + d + i;
          words[lane] = row;
          if constexpr (kDtype == Dtype::kF16) {
            Vec::store(reinterpret_cast<float *>(copies[lane]), load_some(kDtype, row, count));
            words[lane] = copies[lane];
          } else if (count < kStep) {
            __builtin_memset(copies[lane], 0, 64);
            __builtin_memcpy(copies[lane], row, sizeof(Number) * static_cast<std::size_t>(count));
            words[lane] = copies[lane];
          }
        }
        Vec::I columns[kLanes];
        load_transposed(words, columns);
        float *out = memory.chunk + i * kBlockKeys + vec * kLanes;
        MOESERVE_UNROLL for (int j = 0; j < kLanes; ++j) {
          if constexpr (kDtype == Dtype::kBF16) {
            Vec::store(out + 2 * j * kBlockKeys, Vec::bf16_even(columns[j]));
            Vec::store(out + (2 * j + 1) * kBlockKeys, Vec::bf16_odd(columns[j]));
          } else {
            Vec::store(out + j * kBlockKeys, floats_of(columns[j]));
          }
        }
      }
    }
  }

  // chunk[key][number].
  void gather_values(int d, int count) const {
    const int whole = count / kLanes * kLanes;
    for (int key = view.first_vec * kLanes; key < view.num_keys; ++key) {
      const Number *row = rows[key] + call.value_start + d;
      float *out = memory.chunk + key * kChunk;
      if (count == kChunk) {
        MOESERVE_UNROLL for (int i = 0; i < kChunk; i += kLanes) {
          Vec::store(out + i, load_as(kDtype, row, i));
        }
        continue;
      }
      for (int i = 0; i < whole; i += kLanes) Vec::store(out + i, load_as(kDtype, row, i));
      if (whole < count) Vec::store(out + whole, load_some(kDtype, row + whole, count - whole));
    }
  }

  void score(int d, int depth) const {
    const std::ptrdiff_t stride = padded(call.key_dim);
    for (int i = 0; i < view.num_strips; ++i) {
      const Strip &s = view.strips[i];
      ahead.step();
      // Later pairs see later keys, unless they see none.
      int end = 0;
      for (int p = 0; p < s.num_pairs; ++p) end = larger(end, view.end_key[s.first_pair + p]);
      const int vec = view.first_key[s.first_pair] / kLanes;
      const Product product = {memory.queries + s.first_pair * stride + d,
                               stride,
                               memory.chunk + vec * kLanes,
                               memory.scores + s.first_pair * kBlockKeys + vec * kLanes,
                               kBlockKeys,
                               d == 0 ? nullptr : kOnes,
                               depth};
      multiply(product, s.num_pairs, padded(end) / kLanes - vec);
    }
  }

  // Scores to weights, and what that does to the sums so far. Largest scores are compared, and the
  // factors that follow from them computed, for 16 pairs at a time.
  void soften() const {
    alignas(64) float most[kMaxTilePairs];
    for (int pair = 0; pair < view.num_pairs; ++pair) most[pair] = largest_score(pair);
    for (int pair = 0; pair < view.num_pairs; pair += kLanes) {
      raise(most + pair, pair, view.num_pairs - pair);
    }
    for (int pair = 0; pair < view.num_pairs; ++pair) {
      Vec::F sum = Vec::zero();
      const Vec::F largest = Vec::set1(memory.softmax.largest[pair]);
      float *scores = memory.scores + pair * kBlockKeys;
      for_seen(pair, [&](int key, Vec::F score, auto &&hide) __attribute__((always_inline)) {
        const Vec::F weight = hide(exp2_of(Vec::sub(score, largest)), Vec::zero());
        Vec::store(scores + key, weight);
        sum = Vec::add(sum, weight);
      });
      float *weights = memory.softmax.weights + pair * kLanes;
      const Vec::F factor = Vec::set1(memory.factors[pair]);
      Vec::store(weights, Vec::fma(Vec::load(weights), factor, sum));
    }
  }

  MOESERVE_INLINE float largest_score(int pair) const {
    Vec::F most = Vec::set1(-kInfinity);
    for_seen(pair, [&](int, Vec::F score, auto &&hide) __attribute__((always_inline)) {
      most = Vec::max(most, hide(score, Vec::set1(-kInfinity)));
    });
    return Vec::largest(most);
  }

  // body(key, scores, hide) for the vectors of keys that a pair sees. hide(x, other): x where it
  // sees the key, else `other`.
  template <class Body>
  MOESERVE_INLINE void for_seen(int pair, const Body &body) const {
    const float *scores = memory.scores + pair * kBlockKeys;
    const int first = view.first_key[pair], end = view.end_key[pair];
    if (first == 0 && end == kBlockKeys) {
      MOESERVE_UNROLL for (int key = 0; key < kBlockKeys; key += kLanes) {
        body(key, Vec::load(scores + key), [](Vec::F x, Vec::F) { return x; });
      }
      return;
    }
    for (int key = first / kLanes * kLanes; key < end; key += kLanes) {
      const int before = larger(0, first - key), until = smaller(kLanes, end - key);
      body(key, Vec::load(scores + key), [&](Vec::F x, Vec::F other) {
        return Vec::first_lanes(other, before, Vec::first_lanes(x, until, other));
      });
    }
  }

  // most: of the scores of the pairs from `pair` on, of which there are `left`.
  MOESERVE_INLINE void raise(const float *most, int pair, int left) const {
    float *largest = memory.softmax.largest + pair;
    const Vec::F before = load_some(Dtype::kF32, largest, left);
    const Vec::F now = Vec::max(load_some(Dtype::kF32, most, left), before);
    // Neither is NaN; their difference is where both are the same infinity, and then nothing falls.
    const Vec::F fall = Vec::min(Vec::sub(before, now), Vec::zero());
    store_some(Dtype::kF32, memory.factors + pair, exp2_of(fall), left);
    store_some(Dtype::kF32, largest, now, left);
  }

  void mix(int d, int num_vecs) const {
    for (int i = 0; i < view.num_strips; ++i) {
      const Strip &s = view.strips[i];
      ahead.step();
      if (s.alike) {
        add_values(s.first_pair, s.num_pairs, s.first_key, s.end_key, memory.factors + s.first_pair,
                   d, num_vecs);
      } else {
        mix_apart(s, d, num_vecs);
      }
    }
  }

  // A strip whose pairs see different keys. Weights of zero would do, were the values of keys that
  // a pair does not see not possibly infinite. Still, every pair adds its keys in order.
  void mix_apart(const Strip &s, int d, int num_vecs) const {
    const float *factors = memory.factors + s.first_pair;
    const bool together = s.first_key < s.end_key;
    float later[kStripPairs];
    for (int p = 0; p < s.num_pairs; ++p) {
      const int pair = s.first_pair + p, first = view.first_key[pair];
      const int end = together ? s.first_key : view.end_key[pair];
      later[p] = first < end ? 1.0f : factors[p];
      add_values(pair, 1, first, end, factors + p, d, num_vecs);
    }
    if (!together) return;
    add_values(s.first_pair, s.num_pairs, s.first_key, s.end_key, later, d, num_vecs);
    for (int p = 0; p < s.num_pairs; ++p) {
      const int pair = s.first_pair + p;
      add_values(pair, 1, s.end_key, view.end_key[pair], kOnes, d, num_vecs);
    }
  }

  void add_values(int pair, int num_pairs, int first_key, int end_key, const float *factors, int d,
                  int num_vecs) const {
    if (end_key <= first_key) return;
    const std::ptrdiff_t stride = padded(call.value_dim);
    const Product product = {memory.scores + pair * kBlockKeys + first_key,
                             kBlockKeys,
                             memory.chunk + first_key * kChunk,
                             memory.softmax.values + pair * stride + d,
                             stride,
                             factors,
                             end_key - first_key};
    multiply(product, num_pairs, num_vecs);
  }
};

}  // namespace
