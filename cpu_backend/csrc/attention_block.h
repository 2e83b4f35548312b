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
    for (int pair = 0; pair < view.num_pairs; ++pair) {
      if (view.first_key[pair] == 0 && view.end_key[pair] == kBlockKeys) {
        soften_all(pair);
      } else {
        soften_some(pair);
      }
    }
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

  // Scores of a pair to weights, and what that does to its sums so far.
  void soften_all(int pair) const {
    constexpr int kVecs = kBlockKeys / kLanes;
    float *scores = memory.scores + pair * kBlockKeys;
    Vec::F x[kVecs];
    MOESERVE_UNROLL for (int v = 0; v < kVecs; ++v) x[v] = Vec::load(scores + v * kLanes);
    Vec::F most = x[0];
    MOESERVE_UNROLL for (int v = 1; v < kVecs; ++v) most = Vec::max(most, x[v]);
    const Vec::F largest = raise(pair, Vec::largest(most));
    MOESERVE_UNROLL for (int v = 0; v < kVecs; ++v) {
      x[v] = exp2_of(Vec::sub(x[v], largest));
      Vec::store(scores + v * kLanes, x[v]);
    }
    MOESERVE_UNROLL for (int v = 1; v < kVecs; ++v) x[0] = Vec::add(x[0], x[v]);
    add_weights(pair, x[0]);
  }

  // The same where the pair sees a part of the block, perhaps nothing.
  void soften_some(int pair) const {
    const int first = view.first_key[pair], end = view.end_key[pair];
    memory.factors[pair] = 1.0f;
    if (first == end) return;
    const int start = first / kLanes * kLanes, stop = padded(end);
    float *scores = memory.scores + pair * kBlockKeys;
    for (int key = start; key < first; ++key) scores[key] = -kInfinity;
    for (int key = end; key < stop; ++key) scores[key] = -kInfinity;
    Vec::F most = Vec::load(scores + start);
    for (int key = start + kLanes; key < stop; key += kLanes) {
      most = Vec::max(most, Vec::load(scores + key));
    }
    const Vec::F largest = raise(pair, Vec::largest(most));
    for (int key = start; key < stop; key += kLanes) {
      Vec::store(scores + key, exp2_of(Vec::sub(Vec::load(scores + key), largest)));
    }
    // Exactly nothing for hidden keys: exp2_of never returns 0.
    for (int key = start; key < first; ++key) scores[key] = 0.0f;
    for (int key = end; key < stop; ++key) scores[key] = 0.0f;
    Vec::F sum = Vec::load(scores + start);
    for (int key = start + kLanes; key < stop; key += kLanes) {
      sum = Vec::add(sum, Vec::load(scores + key));
    }
    add_weights(pair, sum);
  }

  MOESERVE_INLINE Vec::F raise(int pair, float largest) const {
    float &before = memory.softmax.largest[pair];
    memory.factors[pair] = 1.0f;
    if (largest > before) {
      memory.factors[pair] = exp2_of(before - largest);
      before = largest;
    }
    return Vec::set1(before);
  }

  MOESERVE_INLINE void add_weights(int pair, Vec::F sum) const {
    float *weights = memory.softmax.weights + pair * kLanes;
    Vec::store(weights, Vec::fma(Vec::load(weights), Vec::set1(memory.factors[pair]), sum));
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
