// Work on rows of activations, for every ISA level: conversions, quantisation, activation
// functions, norms. Included after the level's Vec; unnamed namespace (vec_avx512.h).
#pragma once

#include <math.h>

#include "gemm_decoders.h"

namespace {

using moeserve::Activation;
using moeserve::ActivationSpec;
using moeserve::Dtype;
using moeserve::RowFormat;
using moeserve::Rows;

constexpr int kLanes = 16;

MOESERVE_INLINE Vec::F load_as(Dtype dtype, const void *x, std::int64_t i) {
  switch (dtype) {
    case Dtype::kF32:
      return Vec::load(static_cast<const float *>(x) + i);
    case Dtype::kBF16:
      return Vec::load_bf16(static_cast<const std::uint16_t *>(x) + i);
    case Dtype::kF16:
      return Vec::load_f16(static_cast<const std::uint16_t *>(x) + i);
  }
  return Vec::zero();
}

MOESERVE_INLINE void store_as(Dtype dtype, void *x, std::int64_t i, Vec::F value) {
  switch (dtype) {
    case Dtype::kF32:
      return Vec::store(static_cast<float *>(x) + i, value);
    case Dtype::kBF16:
      return Vec::store_bf16(static_cast<std::uint16_t *>(x) + i, value);
    case Dtype::kF16:
      return Vec::store_f16(static_cast<std::uint16_t *>(x) + i, value);
  }
}

// The last 1..15 numbers of a row, with zeros behind them, and back.
inline Vec::F load_tail(Dtype dtype, const void *x, std::int64_t i, std::int64_t count) {
  alignas(64) unsigned char copy[64] = {};
  const std::size_t size = size_of(dtype);
  __builtin_memcpy(copy, static_cast<const unsigned char *>(x) + i * size, count * size);
  return load_as(dtype, copy, 0);
}

inline void store_tail(Dtype dtype, void *x, std::int64_t i, std::int64_t count, Vec::F value) {
  alignas(64) unsigned char copy[64];
  const std::size_t size = size_of(dtype);
  store_as(dtype, copy, 0, value);
  __builtin_memcpy(static_cast<unsigned char *>(x) + i * size, copy, count * size);
}

template <Dtype kType>
struct OfType {
  static constexpr Dtype value = kType;
};

// body(OfType<dtype>): loops inside know the type of their numbers, which otherwise would be looked
// at for every vector.
template <class Body>
inline void with_type(Dtype dtype, const Body &body) {
  switch (dtype) {
    case Dtype::kF32:
      return body(OfType<Dtype::kF32>{});
    case Dtype::kBF16:
      return body(OfType<Dtype::kBF16>{});
    case Dtype::kF16:
      return body(OfType<Dtype::kF16>{});
  }
}

// body(i, load) for every vector of a row of `count` numbers; the last one is padded with zeros.
template <class Body>
inline void for_vectors(Dtype dtype, const void *x, std::int64_t count, const Body &body) {
  with_type(dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) body(i, load_as(kType, x, i));
    if (i < count) body(i, load_tail(kType, x, i, count - i));
  });
}

// out[i] = result(i, x[i]) for every vector of a row, both in dtype; result(i, vector, count) may
// look at `count` numbers only, 16 but for the last.
template <class Result>
inline void map_vectors(Dtype dtype, const void *x, void *out, std::int64_t count,
                        const Result &result) {
  with_type(dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store_as(kType, out, i, result(type, i, load_as(kType, x, i), std::int64_t{kLanes}));
    }
    if (i < count) {
      const std::int64_t left = count - i;
      store_tail(kType, out, i, left, result(type, i, load_tail(kType, x, i, left), left));
    }
  });
}

// Numbers i.. of x: 16, or fewer with zeros behind them.
template <Dtype kType>
MOESERVE_INLINE Vec::F load_few(const void *x, std::int64_t i, std::int64_t count) {
  return count == kLanes ? load_as(kType, x, i) : load_tail(kType, x, i, count);
}

void to_float(Dtype dtype, const void *x, float *out, std::int64_t count) {
  with_type(dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) Vec::store(out + i, load_as(kType, x, i));
    if (i < count) {
      store_tail(Dtype::kF32, out, i, count - i, load_tail(kType, x, i, count - i));
    }
  });
}

void from_float(Dtype dtype, const float *x, void *out, std::int64_t count) {
  with_type(dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_as(kType, out, i, Vec::load(x + i));
    if (i < count) {
      store_tail(kType, out, i, count - i, load_tail(Dtype::kF32, x, i, count - i));
    }
  });
}

// One scale for the row, its codes rounded to nearest; a row that is not finite becomes NaN.
inline void quantize_row(const RowFormat &format, Dtype dtype, const void *x, std::int8_t *codes,
                         std::int32_t *sums, float *scale) {
  Vec::F largest = Vec::zero(), not_finite = Vec::zero();
  for_vectors(dtype, x, format.cols, [&](std::int64_t, Vec::F v) {
    largest = Vec::max(largest, Vec::abs(v));
    not_finite = Vec::fma(v, Vec::zero(), not_finite);  // NaN for Inf and for NaN, else 0
  });
  const float bound = Vec::largest(largest);
  const bool finite = Vec::sum(not_finite) == 0.0f;
  // Below this the inverse would overflow; such a row is zero to every other row's precision.
  const bool zero = !(bound >= 0x1p-120f);
  *scale = finite ? bound / 127.0f : NAN;
  const Vec::F inverse = Vec::set1(zero || !finite ? 0.0f : 127.0f / bound);
  if (finite) {
    for_vectors(dtype, x, format.cols,
                [&](std::int64_t i, Vec::F v) { Vec::store_s8(codes + i, Vec::mul(v, inverse)); });
  } else {
    __builtin_memset(codes, 0, format.data_bytes);
  }
  std::int32_t total = 0;
  for (int g = 0; g < format.num_groups; ++g) {
    const int begin = g * format.group_cols;
    const int end =
        begin + format.group_cols < format.cols ? begin + format.group_cols : format.cols;
    std::int32_t sum = 0;
    int i = begin;
    for (; i + 32 <= end; i += 32) {  // a number that the compiler knows, for vectors
      for (int j = 0; j < 32; ++j) sum += codes[i + j];
    }
    for (; i < end; ++i) sum += codes[i];
    sums[g] = -format.zero * sum;
    total += sum;
  }
  if (format.row_zero != 0) sums[format.num_groups] = -format.row_zero * total;
}

void prepare_row(const RowFormat &format, Dtype dtype, const void *x, const Rows &rows,
                 std::int64_t row) {
  std::uint8_t *data = rows.data + row * format.data_bytes;
  switch (format.form) {
    case moeserve::RowForm::kF32: {
      auto *out = reinterpret_cast<float *>(data);
      for_vectors(dtype, x, format.cols, [&](std::int64_t i, Vec::F v) { Vec::store(out + i, v); });
      break;
    }
    case moeserve::RowForm::kBF16: {
      auto *out = reinterpret_cast<std::uint16_t *>(data);
      for_vectors(dtype, x, format.cols,
                  [&](std::int64_t i, Vec::F v) { Vec::store_bf16(out + i, v); });
      break;
    }
    case moeserve::RowForm::kInt8:
      quantize_row(format, dtype, x, reinterpret_cast<std::int8_t *>(data),
                   rows.sums + row * format.num_sums(), rows.scales + row);
      break;
  }
  // Whole vectors were written; what lies behind them must be zero too.
  const std::size_t item = format.form == moeserve::RowForm::kF32    ? 4
                           : format.form == moeserve::RowForm::kBF16 ? 2
                                                                     : 1;
  const std::size_t written = (format.cols + kLanes - 1) / kLanes * kLanes * item;
  if (written < format.data_bytes) {
    __builtin_memset(data + written, 0, format.data_bytes - written);
  }
}

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts, Cody and Waite), e^r by its Taylor
// series to the seventh power (error 5e-9 relative), 2^n by the exponent. Clamped to where the
// result and its inverse are normal numbers; NaN stays NaN.
inline Vec::F exp(Vec::F x) {
  x = Vec::min(Vec::set1(87.0f), Vec::max(Vec::set1(-87.0f), x));
  const Vec::F n = Vec::round(Vec::mul(x, Vec::set1(1.44269504f)));
  Vec::F r = Vec::fma(n, Vec::set1(-0.693359375f), x);
  r = Vec::fma(n, Vec::set1(2.12194440e-4f), r);
  Vec::F sum = Vec::set1(1.0f / 5040);
  const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float factor : factors) sum = Vec::fma(sum, r, Vec::set1(factor));
  return Vec::scale_pow2(sum, n);
}

inline Vec::F sigmoid(Vec::F x) {
  const Vec::F one = Vec::set1(1.0f);
  return Vec::div(one, Vec::add(one, exp(Vec::sub(Vec::zero(), x))));
}

inline Vec::F erf_lanes(Vec::F x) {
  alignas(64) float v[kLanes];
  Vec::store(v, x);
  for (float &lane : v) lane = ::erff(lane);
  return Vec::load(v);
}

inline Vec::F activate(const ActivationSpec &spec, Vec::F gate, Vec::F up) {
  const Vec::F one = Vec::set1(1.0f), half = Vec::set1(0.5f);
  switch (spec.kind) {
    case Activation::kSilu:
      return Vec::mul(Vec::mul(gate, sigmoid(gate)), up);
    case Activation::kGelu: {
      const Vec::F phi = Vec::add(one, erf_lanes(Vec::mul(gate, Vec::set1(0.70710678f))));
      return Vec::mul(Vec::mul(Vec::mul(half, gate), phi), up);
    }
    case Activation::kGeluTanh: {
      // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
      const Vec::F cubic = Vec::fma(Vec::mul(gate, gate), Vec::set1(0.044715f), one);
      const Vec::F twice = Vec::mul(Vec::mul(gate, cubic), Vec::set1(2 * 0.79788456f));
      return Vec::mul(Vec::mul(gate, sigmoid(twice)), up);
    }
    case Activation::kQuickGelu:
      return Vec::mul(Vec::mul(gate, sigmoid(Vec::mul(gate, Vec::set1(1.702f)))), up);
    case Activation::kRelu:
      return Vec::mul(Vec::max(Vec::zero(), gate), up);
    case Activation::kSwigluClamped: {
      const Vec::F limit = Vec::set1(spec.limit), low = Vec::set1(-spec.limit);
      gate = Vec::min(limit, gate);
      up = Vec::min(limit, Vec::max(low, up));
      const Vec::F swish = Vec::mul(gate, sigmoid(Vec::mul(gate, Vec::set1(spec.alpha))));
      return Vec::mul(Vec::add(up, one), swish);
    }
  }
  return gate;
}

void gated(const ActivationSpec &spec, const float *gate_up, const float *bias, float *out,
           int num_pairs) {
  for (int i = 0; i < num_pairs; ++i) {
    Vec::F gate = Vec::load(gate_up + 2 * kLanes * i);
    Vec::F up = Vec::load(gate_up + 2 * kLanes * i + kLanes);
    if (bias != nullptr) {
      gate = Vec::add(gate, Vec::load(bias + 2 * kLanes * i));
      up = Vec::add(up, Vec::load(bias + 2 * kLanes * i + kLanes));
    }
    Vec::store(out + kLanes * i, activate(spec, gate, up));
  }
}

void accumulate(float *y, const float *x, const float *bias, float factor, int count) {
  const Vec::F scale = Vec::set1(factor);
  for (int i = 0; i < count; i += kLanes) {
    Vec::F value = Vec::load(x + i);
    if (bias != nullptr) value = Vec::add(value, Vec::load(bias + i));
    Vec::store(y + i, Vec::fma(value, scale, Vec::load(y + i)));
  }
}

void rms_norm(Dtype dtype, const void *x, const float *weight, float eps, void *out, int count) {
  Vec::F squares = Vec::zero();
  for_vectors(dtype, x, count, [&](std::int64_t, Vec::F v) { squares = Vec::fma(v, v, squares); });
  const float mean = Vec::sum(squares) / static_cast<float>(count);
  const Vec::F factor = Vec::set1(1.0f / sqrtf(mean + eps));
  map_vectors(dtype, x, out, count, [&](auto, std::int64_t i, Vec::F v, std::int64_t lanes) {
    return Vec::mul(Vec::mul(v, factor), load_few<Dtype::kF32>(weight, i, lanes));
  });
}

void add(Dtype dtype, void *x, const void *y, int count) {
  map_vectors(dtype, x, x, count, [&](auto type, std::int64_t i, Vec::F v, std::int64_t lanes) {
    return Vec::add(v, load_few<decltype(type)::value>(y, i, lanes));
  });
}

// NaN and infinities go where they go in the plain formula: whatever `largest` is beside a NaN, the
// sum is NaN and so is every number.
void softmax(float *x, int count) {
  const int whole = count / kLanes * kLanes;
  float largest = x[0];
  if (whole > 0) {
    Vec::F most = Vec::load(x);
    for (int i = kLanes; i < whole; i += kLanes) most = Vec::max(most, Vec::load(x + i));
    largest = Vec::largest(most);
  }
  for (int i = whole; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
  Vec::F sums = Vec::zero();
  for (int i = 0; i < whole; i += kLanes) {
    const Vec::F e = exp(Vec::sub(Vec::load(x + i), Vec::set1(largest)));
    Vec::store(x + i, e);
    sums = Vec::add(sums, e);
  }
  float sum = Vec::sum(sums);
  if (whole < count) {
    alignas(64) float e[kLanes];
    Vec::store(e,
               exp(Vec::sub(load_tail(Dtype::kF32, x, whole, count - whole), Vec::set1(largest))));
    for (int i = whole; i < count; ++i) sum += x[i] = e[i - whole];
  }
  for (int i = 0; i < count; ++i) x[i] /= sum;
}

void sigmoid_row(float *x, int count) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t lanes = count - i < kLanes ? count - i : kLanes;
    store_tail(Dtype::kF32, x, i, lanes, sigmoid(load_tail(Dtype::kF32, x, i, lanes)));
  }
}

// -- the limits of the machine, for comparison
// ------------------------------------------------------

// Reads all bytes once (a multiple of 1024) and returns something that depends on each.
float read_all(const std::uint8_t *data, std::size_t num_bytes) {
  Vec::F sum[8];
  for (auto &s : sum) s = Vec::zero();
  const std::size_t part = num_bytes / 4 / 256 * 256;  // four streams, as in the decode tiles
  for (std::size_t at = 0; at < part; at += 128) {
    for (int stream = 0; stream < 4; ++stream) {
      const auto *p = reinterpret_cast<const float *>(data + stream * part + at);
      Vec::prefetch(data + stream * part + at + 2048);
      sum[2 * stream] = Vec::max(sum[2 * stream], Vec::load(p));
      sum[2 * stream + 1] = Vec::max(sum[2 * stream + 1], Vec::load(p + kLanes));
    }
  }
  for (int i = 1; i < 8; ++i) sum[0] = Vec::max(sum[0], sum[i]);
  return Vec::largest(sum[0]);
}

// `rounds` times 24 independent multiply-adds of a vector, all in registers: 24 * 16 * 2
// operations.
float multiply_add_f32(std::int64_t rounds) {
  constexpr int kChains = Vec::kRegisters >= 32 ? 24 : 6;
  Vec::F sum[kChains];
  MOESERVE_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = Vec::set1(static_cast<float>(i));
  Vec::F a = Vec::set1(1.0f - 0x1p-20f), b = Vec::set1(0x1p-20f);
  for (std::int64_t round = 0; round < rounds * 24 / kChains; ++round) {
    MOESERVE_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = Vec::fma(sum[i], a, b);
  }
  MOESERVE_UNROLL for (int i = 1; i < kChains; ++i) sum[0] = Vec::add(sum[0], sum[i]);
  return Vec::sum(sum[0]);
}

float multiply_add_bf16(std::int64_t rounds) {
  if constexpr (Vec::kHasBf16Dot) {
    constexpr int kChains = 24;
    Vec::F sum[kChains];
    MOESERVE_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = Vec::set1(static_cast<float>(i));
    const std::uint16_t ones[2] = {0x3c00, 0x3c00};
    const auto weight = Vec::iset1(0x3c003c00);
    for (std::int64_t round = 0; round < rounds; ++round) {
      MOESERVE_UNROLL for (int i = 0; i < kChains; ++i) sum[i] =
          Vec::bf16_dot(sum[i], weight, ones);
    }
    MOESERVE_UNROLL for (int i = 1; i < kChains; ++i) sum[0] = Vec::add(sum[0], sum[i]);
    return Vec::sum(sum[0]);
  }
  return 0.0f;
}

float multiply_add_int8(std::int64_t rounds) {
  constexpr int kChains = Vec::kRegisters >= 32 ? 24 : 6;
  Vec::I sum[kChains];
  MOESERVE_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = Vec::iset1(i);
  const std::int8_t four[4] = {1, -1, 2, -2};
  auto x = Vec::broadcast4(four);
  auto codes = Vec::iset1(0x01020304);
  for (std::int64_t round = 0; round < rounds * 24 / kChains; ++round) {
    MOESERVE_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = Vec::dot(sum[i], codes, x);
  }
  float total = 0.0f;
  MOESERVE_UNROLL for (int i = 0; i < kChains; ++i) total += Vec::sum(Vec::to_float(sum[i]));
  return total;
}

}  // namespace
