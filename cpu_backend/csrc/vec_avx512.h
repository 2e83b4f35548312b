// Sixteen lanes on AVX-512 (F, BW, VL, DQ), with VNNI and BF16 where this file is compiled for
// them.
//
// Included by one translation unit per ISA level. Everything is in an unnamed namespace: a function
// with external linkage, compiled twice with different instruction sets, would be merged by the
// linker into one of the two, and a machine without AVX-512 could end up in the wrong one.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace {

struct Vec {
  using F = __m512;   // 16 x float
  using I = __m512i;  // 16 x int32, or 64 bytes
  static constexpr int kRegisters = 32;
#if defined(__AVX512BF16__)
  static constexpr bool kHasBf16Dot = true;
#else
  static constexpr bool kHasBf16Dot = false;
#endif

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float *p) { return _mm512_loadu_ps(p); }
  static void store(float *p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  // a * 2^n for n with an integral value; results below the normal range may lose bits.
  static F scale_pow2(F a, F n) { return _mm512_scalef_ps(a, n); }
  // Fixed order of additions: ((i, i+8), (i, i+4), (i, i+2), (i, i+1)).
  static float sum(F a) {
    const __m256 h8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 h4 = _mm_add_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
    const __m128 h2 = _mm_add_ps(h4, _mm_movehl_ps(h4, h4));
    return _mm_cvtss_f32(_mm_add_ss(h2, _mm_movehdup_ps(h2)));
  }
  static float largest(F a) { return _mm512_reduce_max_ps(a); }
  // `count` lanes of a, the others of b.
  static F first_lanes(F a, int count, F b) {
    return _mm512_mask_mov_ps(b, static_cast<__mmask16>((1u << count) - 1), a);
  }

  static F load_bf16(const std::uint16_t *p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  // Round to nearest even; NaN stays NaN.
  static void store_bf16(std::uint16_t *p, F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i all = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(all));
  }
  static F load_f16(const std::uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  }
  static void store_f16(std::uint16_t *p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static I load64(const std::uint8_t *p) { return _mm512_loadu_si512(p); }
  static void store64(std::uint8_t *p, I x) { _mm512_storeu_si512(p, x); }
  static I iset1(std::int32_t x) { return _mm512_set1_epi32(x); }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  // 16 bytes, each widened to 32 bits without sign.
  static I load_u8(const std::uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  }
  // 16 floats, rounded to nearest and kept within int8, to 16 bytes.
  static void store_s8(std::int8_t *p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
  }

  // A 64-byte chunk of bf16 pairs, [16 outputs][2 inputs]: the inputs of one parity as float.
  static F bf16_even(I raw) { return as_float(_mm512_slli_epi32(raw, 16)); }
  static F bf16_odd(I raw) {
    return as_float(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // A chunk of bytes, [16 outputs][4 inputs]: input J, less `zero`, as float.
  template <int J>
  static F byte_at(I raw, std::int32_t zero) {
    const I code = J == 3 ? _mm512_srli_epi32(raw, 24)
                          : _mm512_and_si512(_mm512_srli_epi32(raw, 8 * J), iset1(0xff));
    return to_float(_mm512_sub_epi32(code, iset1(zero)));
  }
  // A chunk of nibbles, [16 outputs][8 inputs], looked up in a table of 16 numbers.
  struct Table {
    F values;
  };
  static Table table(const float *p) { return {load(p)}; }
  template <int J>
  static F nibble_at(I raw, const Table &t) {
    constexpr int shift = 8 * (J % 4) + 4 * (J / 4);
    const I index = shift == 0 ? raw : _mm512_srli_epi32(raw, shift);
    return _mm512_permutexvar_ps(index, t.values);  // looks at the lowest 4 bits only
  }
  // 16 e4m3 numbers as float times 2^-8: a float16 of the same bits has that exponent bias.
  static F load_e4m3_scaled(const std::uint8_t *p) {
    const __m256i wide =
        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    const __m256i half =
        _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    return _mm512_cvtph_ps(half);
  }

  // Nibbles as unsigned bytes: inputs 0-3, inputs 4-7; and bytes looked up by their low nibble.
  static I low_nibbles(I raw) { return _mm512_and_si512(raw, _mm512_set1_epi8(15)); }
  static I high_nibbles(I raw) {
    return _mm512_and_si512(_mm512_srli_epi32(raw, 4), _mm512_set1_epi8(15));
  }
  static I byte_table(const std::uint8_t *p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
  }
  static I look_up(I table, I index) { return _mm512_shuffle_epi8(table, index); }

  // Four signed bytes in every lane, in the form that `dot` wants.
  struct Broadcast {
#if defined(__AVX512VNNI__)
    I bytes;
#else
    I even, odd;
#endif
  };
  static Broadcast broadcast4(const std::int8_t *p) {
    std::int32_t four;
    __builtin_memcpy(&four, p, 4);
    const I bytes = _mm512_set1_epi32(four);
#if defined(__AVX512VNNI__)
    return {bytes};
#else
    return {_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), _mm512_srai_epi16(bytes, 8)};
#endif
  }
  // acc + the sum of four products of unsigned and signed bytes, exact in 32 bits.
  static I dot(I acc, I codes, const Broadcast &x) {
#if defined(__AVX512VNNI__)
    // As assembly because GCC 12 keeps arrays of sums in memory when the intrinsic updates them.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x.bytes));
    return acc;
#else
    const I even = _mm512_and_si512(codes, _mm512_set1_epi16(0xff));
    const I odd = _mm512_srli_epi16(codes, 8);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(even, x.even));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(odd, x.odd));
#endif
  }
  // a * b per lane, for b within 16 bits and a within 0..255.
  static I mul_small(I a, std::int32_t b) {
    return _mm512_madd_epi16(a, _mm512_set1_epi32(b & 0xffff));
  }

  // 16 signed bytes, widened to 16 bits, zeros above.
  static I load_s8_low(const std::int8_t *p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm512_and_si512(_mm512_cvtepi8_epi32(bytes), _mm512_set1_epi32(0xffff));
  }
  static F load_s8(const std::int8_t *p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return to_float(_mm512_cvtepi8_epi32(bytes));
  }
  // acc + a * b per lane, for a within 16 bits and b of load_s8_low.
  static I mul_add_small(I acc, I a, I b) {
#if defined(__AVX512VNNI__)
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
  }

  // A factor f of -15 to 15 for all four bytes of each lane, in the form that `scale_nibbles`
  // wants. Its sign turns codes round: f * (code - 8) = -f * ((15 - code) - 7).
  struct Factor {
    I turn;       // 15 - code where ones
    I low, high;  // |f|, and |f| << 12, in words
    I offset;     // 128 - |f| * 8, or 7
  };
  static Factor load_factor(const std::int8_t *p) {
    const I own = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    const I first = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    const I bytes = _mm512_shuffle_epi8(own, first);
    const I size = _mm512_abs_epi8(bytes), turn = _mm512_srai_epi16(bytes, 15);
    const I zero = _mm512_sub_epi8(_mm512_slli_epi16(size, 3), _mm512_and_si512(size, turn));
    return {turn, _mm512_and_si512(size, _mm512_set1_epi16(0xff)), _mm512_slli_epi16(size, 12),
            _mm512_sub_epi8(_mm512_set1_epi8(static_cast<char>(128)), zero)};
  }
  // A chunk of nibbles to bytes of f * (code - 8) + 128: inputs 0-3, inputs 4-7.
  static void scale_nibbles(I raw, const Factor &f, I &low, I &high) {
    constexpr int kTurnAndMask = 0x28;  // (a ^ b) & c
    const I low_codes =
        _mm512_ternarylogic_epi32(raw, f.turn, _mm512_set1_epi8(0x0f), kTurnAndMask);
    const I high_codes = _mm512_ternarylogic_epi32(
        raw, f.turn, _mm512_set1_epi8(static_cast<char>(0xf0)), kTurnAndMask);
    // Two codes in a word: their products with |f| stay in their own bytes. The higher half of that
    // with |f| << 12 has the codes' own 4 bits shifted out.
    low = _mm512_add_epi8(_mm512_mullo_epi16(low_codes, f.low), f.offset);
    high = _mm512_add_epi8(_mm512_mulhi_epu16(high_codes, f.high), f.offset);
  }

  // acc + two products of bf16 numbers per lane; where kHasBf16Dot is false, never run.
  static F bf16_dot(F acc, I raw, const std::uint16_t *pair) {
#if defined(__AVX512BF16__)
    std::int32_t two;
    __builtin_memcpy(&two, pair, 4);
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(raw), "v"(_mm512_set1_epi32(two)));
    return acc;
#else
    (void)raw, (void)pair;
    return acc;
#endif
  }

  // As assembly because GCC 12 takes a function that only prefetches for one without effect, and
  // drops the calls.
  static void prefetch(const void *p) {
    __asm__ __volatile__("prefetcht0 %0" : : "m"(*static_cast<const char *>(p)));
  }
};

}  // namespace
