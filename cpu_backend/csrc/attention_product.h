// What attention computes with: exp2, and the one product that gives scores and mixtures.
//
// Included by one translation unit per ISA level, after its Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include "attention.h"
#include "gemm_kernels.h"
#include "row_kernels.h"

namespace {

using moeserve::kBlockKeys;

constexpr int kStripPairs = 6;                             // of a register tile
constexpr int kStripVecs = Vec::kRegisters >= 32 ? 4 : 1;  // of a register tile
constexpr int kChunk = 64;  // numbers of a key or value that are widened at a time
constexpr float kInfinity = __builtin_inff();
constexpr float kOnes[kStripPairs] = {1, 1, 1, 1, 1, 1};

constexpr int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }
template <class T>
constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T larger(T a, T b) {
  return a > b ? a : b;
}

// 2^x for x <= 0, within 1 ulp; below 2^-126 it is 2^-126, NaN stays NaN. x = n + f with n integral
// and |f| <= 1/2, exactly; 2^f is a polynomial with the least relative error on that interval
// (Remez exchange, 2.6e-9 before its coefficients are rounded), and 1 at 0.
MOESERVE_INLINE Vec::F exp2_of(Vec::F x) {
  const Vec::F kept = Vec::max(Vec::set1(-126.0f), x);
  const Vec::F n = Vec::round(kept);
  const Vec::F f = Vec::sub(kept, n);
  Vec::F y = Vec::set1(0x1.4d1ce4p-13f);
  y = Vec::fma(y, f, Vec::set1(0x1.5fbd08p-10f));
  y = Vec::fma(y, f, Vec::set1(0x1.3b21a2p-7f));
  y = Vec::fma(y, f, Vec::set1(0x1.c6ada8p-5f));
  y = Vec::fma(y, f, Vec::set1(0x1.ebfbe6p-3f));
  y = Vec::fma(y, f, Vec::set1(0x1.62e432p-1f));
  y = Vec::fma(y, f, Vec::set1(1.0f));
  return Vec::scale_pow2(y, n);
}

inline float exp2_of(float x) {
  float lanes[kLanes];
  Vec::store(lanes, exp2_of(Vec::set1(x)));
  return lanes[0];
}

// The first `count` numbers, at most 16, with zeros behind them; and back.
MOESERVE_INLINE Vec::F load_some(Dtype dtype, const void *p, int count) {
  return count >= kLanes ? load_as(dtype, p, 0) : load_tail(dtype, p, 0, count);
}
MOESERVE_INLINE void store_some(Dtype dtype, void *p, Vec::F x, int count) {
  if (count >= kLanes) return store_as(dtype, p, 0, x);
  store_tail(dtype, p, 0, count, x);
}

// Rows of kv to be fetched into the second-level cache, some lines before every product.
struct Ahead {
  const char *const *row;
  const char *const *end_row;
  int row_bytes;
  int step_lines;
  int offset = 0;

  void step() {
    for (int i = 0; i < step_lines && row != end_row; ++i) {
      __builtin_prefetch(*row + offset, 0, 2);
      offset += 64;
      if (offset >= row_bytes) {
        offset = 0;
        ++row;
      }
    }
  }
};

// c = c * factor + a x b, or a x b where factors is null: rows of c and a are pairs, b is a chunk.
// Every sum runs over the depth in order, so that it does not matter how rows and vectors are cut.
struct Product {
  const float *a;
  std::ptrdiff_t a_stride;
  const float *b;  // [depth, kChunk]
  float *c;
  std::ptrdiff_t c_stride;
  const float *factors;
  int depth;
};

template <int kRows, int kVecs>
void multiply_strip(const Product &p, int vec) {
  const float *const a = p.a, *b = p.b + vec * kLanes;
  float *const c = p.c + vec * kLanes;
  const std::ptrdiff_t a_stride = p.a_stride, c_stride = p.c_stride;
  Vec::F sums[kRows][kVecs];
  MOESERVE_UNROLL for (int r = 0; r < kRows; ++r) {
    MOESERVE_UNROLL for (int v = 0; v < kVecs; ++v) {
      sums[r][v] = p.factors == nullptr ? Vec::zero()
                                        : Vec::mul(Vec::load(c + r * c_stride + v * kLanes),
                                                   Vec::set1(p.factors[r]));
    }
  }
  const int depth = p.depth;
  for (int k = 0; k < depth; ++k, b += kChunk) {
    Vec::F vectors[kVecs];
    MOESERVE_UNROLL for (int v = 0; v < kVecs; ++v) vectors[v] = Vec::load(b + v * kLanes);
    MOESERVE_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec::F number = Vec::set1(a[r * a_stride + k]);
      MOESERVE_UNROLL for (int v = 0; v < kVecs; ++v) {
        sums[r][v] = Vec::fma(number, vectors[v], sums[r][v]);
      }
    }
  }
  MOESERVE_UNROLL for (int r = 0; r < kRows; ++r) {
    MOESERVE_UNROLL for (int v = 0; v < kVecs; ++v) {
      Vec::store(c + r * c_stride + v * kLanes, sums[r][v]);
    }
  }
}

template <int kRows>
void multiply_rows(const Product &p, int num_vecs) {
  int v = 0;
  for (; v + kStripVecs <= num_vecs; v += kStripVecs) multiply_strip<kRows, kStripVecs>(p, v);
  if constexpr (kStripVecs == 4) {
    if (num_vecs - v == 3) multiply_strip<kRows, 3>(p, v);
    if (num_vecs - v == 2) multiply_strip<kRows, 2>(p, v);
    if (num_vecs - v == 1) multiply_strip<kRows, 1>(p, v);
  }
}

inline void multiply(const Product &p, int num_rows, int num_vecs) {
  switch (num_rows) {
    case 1:
      return multiply_rows<1>(p, num_vecs);
    case 2:
      return multiply_rows<2>(p, num_vecs);
    case 3:
      return multiply_rows<3>(p, num_vecs);
    case 4:
      return multiply_rows<4>(p, num_vecs);
    case 5:
      return multiply_rows<5>(p, num_vecs);
    case 6:
      return multiply_rows<6>(p, num_vecs);
  }
}

}  // namespace
