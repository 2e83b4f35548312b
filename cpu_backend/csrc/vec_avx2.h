// Sixteen lanes as two registers of AVX2, with FMA and F16C. See vec_avx512.h for what each does
// and for why everything is in an unnamed namespace.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace {

struct Vec {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  static constexpr int kRegisters = 16;
  static constexpr bool kHasBf16Dot = false;

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float *p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static F round(F x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
  }
  static F abs(F x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
  }
  // For n within -126..127 only.
  static F scale_pow2(F x, F n) {
    return {_mm256_mul_ps(x.a, pow2(n.a)), _mm256_mul_ps(x.b, pow2(n.b))};
  }
  static float sum(F x) {
    const __m256 h8 = _mm256_add_ps(x.a, x.b);
    const __m128 h4 = _mm_add_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
    const __m128 h2 = _mm_add_ps(h4, _mm_movehl_ps(h4, h4));
    return _mm_cvtss_f32(_mm_add_ss(h2, _mm_movehdup_ps(h2)));
  }
  static float largest(F x) {
    const __m256 h8 = _mm256_max_ps(x.a, x.b);
    const __m128 h4 = _mm_max_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
    const __m128 h2 = _mm_max_ps(h4, _mm_movehl_ps(h4, h4));
    return _mm_cvtss_f32(_mm_max_ss(h2, _mm_movehdup_ps(h2)));
  }
  static F first_lanes(F x, int count, F y) {
    const __m256i all = _mm256_set1_epi32(count), lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i a = _mm256_cmpgt_epi32(all, lanes);
    const __m256i b = _mm256_cmpgt_epi32(all, _mm256_add_epi32(lanes, _mm256_set1_epi32(8)));
    return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(a)),
            _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(b))};
  }

  static F load_bf16(const std::uint16_t *p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
  static void store_bf16(std::uint16_t *p, F x) {
    const __m256i packed = _mm256_packus_epi32(to_bf16(x.a), to_bf16(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  static F load_f16(const std::uint16_t *p) {
    return {_mm256_cvtph_ps(load16(p)), _mm256_cvtph_ps(load16(p + 8))};
  }
  static void store_f16(std::uint16_t *p, F x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x.a, mode));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p + 8), _mm256_cvtps_ph(x.b, mode));
  }

  static I load64(const std::uint8_t *p) {
    const auto *q = reinterpret_cast<const __m256i *>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static void store64(std::uint8_t *p, I x) {
    auto *q = reinterpret_cast<__m256i *>(p);
    _mm256_storeu_si256(q, x.a);
    _mm256_storeu_si256(q + 1, x.b);
  }
  static I iset1(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static I load_u8(const std::uint8_t *p) {
    const auto *q = reinterpret_cast<const __m128i *>(p);
    const __m128i bytes = _mm_loadu_si128(q);
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  }
  static void store_s8(std::int8_t *p, F x) {
    const __m256i words = _mm256_permute4x64_epi64(
        _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), bytes);
  }

  static F bf16_even(I x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
  }
  static F bf16_odd(I x) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_and_si256(x.a, mask)),
            _mm256_castsi256_ps(_mm256_and_si256(x.b, mask))};
  }
  template <int J>
  static F byte_at(I x, std::int32_t zero) {
    const __m256i mask = _mm256_set1_epi32(0xff), less = _mm256_set1_epi32(zero);
    const auto one = [&](__m256i v) {
      const __m256i code = _mm256_and_si256(_mm256_srli_epi32(v, 8 * J), mask);
      return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, less));
    };
    return {one(x.a), one(x.b)};
  }
  // Twice each value, as signed bytes: no 16-entry table of floats fits a register here.
  struct Table {
    __m256i doubled;
  };
  static Table table(const float *p) {
    alignas(16) std::int8_t doubled[16];
    for (int i = 0; i < 16; ++i) doubled[i] = static_cast<std::int8_t>(2 * p[i]);
    return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<__m128i *>(doubled)))};
  }
  template <int J>
  static F nibble_at(I x, const Table &t) {
    constexpr int shift = 8 * (J % 4) + 4 * (J / 4);
    const __m256i mask = _mm256_set1_epi32(15);
    const __m256 half = _mm256_set1_ps(0.5f);
    const auto one = [&](__m256i v) {
      const __m256i index = _mm256_and_si256(_mm256_srli_epi32(v, shift), mask);
      const __m256i byte = _mm256_slli_epi32(_mm256_shuffle_epi8(t.doubled, index), 24);
      return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srai_epi32(byte, 24)), half);
    };
    return {one(x.a), one(x.b)};
  }
  static F load_e4m3_scaled(const std::uint8_t *p) {
    const __m256i wide =
        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    const __m256i half =
        _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
  }

  static I low_nibbles(I x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
  }
  static I high_nibbles(I x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi32(x.a, 4), mask),
            _mm256_and_si256(_mm256_srli_epi32(x.b, 4), mask)};
  }
  static I byte_table(const std::uint8_t *p) {
    const __m256i t = _mm256_broadcastsi128_si256(load16(p));
    return {t, t};
  }
  static I look_up(I t, I index) {
    return {_mm256_shuffle_epi8(t.a, index.a), _mm256_shuffle_epi8(t.b, index.b)};
  }

  struct Broadcast {
    __m256i even, odd;
  };
  static Broadcast broadcast4(const std::int8_t *p) {
    std::int32_t four;
    __builtin_memcpy(&four, p, 4);
    const __m256i bytes = _mm256_set1_epi32(four);
    return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
  }
  // Not vpmaddubsw: its sums of two products saturate at 16 bits.
  static I dot(I acc, I codes, const Broadcast &x) {
    const auto one = [&](__m256i sum, __m256i c) {
      const __m256i even = _mm256_and_si256(c, _mm256_set1_epi16(0xff));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, x.even));
      return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_srli_epi16(c, 8), x.odd));
    };
    return {one(acc.a, codes.a), one(acc.b, codes.b)};
  }
  static I mul_small(I x, std::int32_t y) {
    const __m256i factor = _mm256_set1_epi32(y & 0xffff);
    return {_mm256_madd_epi16(x.a, factor), _mm256_madd_epi16(x.b, factor)};
  }

  static I load_s8_low(const std::int8_t *p) {
    const I own = load_s8_wide(p);
    const __m256i mask = _mm256_set1_epi32(0xffff);
    return {_mm256_and_si256(own.a, mask), _mm256_and_si256(own.b, mask)};
  }
  static F load_s8(const std::int8_t *p) { return to_float(load_s8_wide(p)); }
  static I mul_add_small(I acc, I x, I y) {
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(x.a, y.a)),
            _mm256_add_epi32(acc.b, _mm256_madd_epi16(x.b, y.b))};
  }

  struct Factor {
    I turn, low, high, offset;
  };
  static Factor load_factor(const std::int8_t *p) {
    const I own = load_s8_wide(p);
    Factor f;
    factor_of(own.a, f.turn.a, f.low.a, f.high.a, f.offset.a);
    factor_of(own.b, f.turn.b, f.low.b, f.high.b, f.offset.b);
    return f;
  }
  static void scale_nibbles(I raw, const Factor &f, I &low, I &high) {
    const __m256i low_mask = _mm256_set1_epi8(0x0f);
    const __m256i high_mask = _mm256_set1_epi8(static_cast<char>(0xf0));
    const auto low_bytes = [&](__m256i codes, __m256i factor, __m256i offset) {
      const __m256i own = _mm256_and_si256(codes, low_mask);
      return _mm256_add_epi8(_mm256_mullo_epi16(own, factor), offset);
    };
    const auto high_bytes = [&](__m256i codes, __m256i factor, __m256i offset) {
      const __m256i own = _mm256_and_si256(codes, high_mask);
      return _mm256_add_epi8(_mm256_mulhi_epu16(own, factor), offset);
    };
    const I codes = {_mm256_xor_si256(raw.a, f.turn.a), _mm256_xor_si256(raw.b, f.turn.b)};
    low = {low_bytes(codes.a, f.low.a, f.offset.a), low_bytes(codes.b, f.low.b, f.offset.b)};
    high = {high_bytes(codes.a, f.high.a, f.offset.a), high_bytes(codes.b, f.high.b, f.offset.b)};
  }

  // Never run: kHasBf16Dot is false.
  static F bf16_dot(F acc, I, const std::uint16_t *) { return acc; }

  static void prefetch(const void *p) {
    __asm__ __volatile__("prefetcht0 %0" : : "m"(*static_cast<const char *>(p)));
  }

 private:
  static I load_s8_wide(const std::int8_t *p) {
    const __m128i bytes = load16(p);
    return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
  }
  static void factor_of(__m256i own, __m256i &turn, __m256i &low, __m256i &high, __m256i &offset) {
    const __m256i first = _mm256_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0, 0x0c0c0c0c,
                                           0x08080808, 0x04040404, 0);
    const __m256i bytes = _mm256_shuffle_epi8(own, first);
    const __m256i size = _mm256_abs_epi8(bytes);
    turn = _mm256_srai_epi16(bytes, 15);
    low = _mm256_and_si256(size, _mm256_set1_epi16(0xff));
    high = _mm256_slli_epi16(size, 12);
    const __m256i zero = _mm256_sub_epi8(_mm256_slli_epi16(size, 3), _mm256_and_si256(size, turn));
    offset = _mm256_sub_epi8(_mm256_set1_epi8(static_cast<char>(128)), zero);
  }
  static __m128i load16(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
  static __m256 widen_bf16(const std::uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16));
  }
  static __m256i to_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  }
  static __m256 pow2(__m256 n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
};

}  // namespace
