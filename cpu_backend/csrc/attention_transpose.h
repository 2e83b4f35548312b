// 16 x 16 transposition of 32-bit words for the Vec of this translation unit, by which keys come to
// lie in lanes. In an unnamed namespace for the reason given in vec_avx512.h.
#pragma once

namespace {

#if defined(__AVX512F__)

inline Vec::F floats_of(Vec::I x) { return _mm512_castsi512_ps(x); }

// Word j of p[i] becomes word i of x[j]. Quarters of rows are put in place while they are loaded,
// which load ports do beside the shuffles; two rounds of unpacking remain.
inline void load_transposed(const void *const *p, Vec::I *x) {
  const auto quarter = [&](int row, int part) {
    return _mm_loadu_si128(static_cast<const __m128i *>(p[row]) + part);
  };
  for (int part = 0; part < 4; ++part) {
    __m512i rows[4];  // rows[i]: part of the rows i, i + 4, i + 8, i + 12
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm512_castsi128_si512(quarter(i, part));
      rows[i] = _mm512_inserti32x4(rows[i], quarter(i + 4, part), 1);
      rows[i] = _mm512_inserti32x4(rows[i], quarter(i + 8, part), 2);
      rows[i] = _mm512_inserti32x4(rows[i], quarter(i + 12, part), 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(rows[0], rows[1]);
    const __m512i high01 = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(rows[2], rows[3]);
    const __m512i high23 = _mm512_unpackhi_epi32(rows[2], rows[3]);
    x[4 * part] = _mm512_unpacklo_epi64(low01, low23);
    x[4 * part + 1] = _mm512_unpackhi_epi64(low01, low23);
    x[4 * part + 2] = _mm512_unpacklo_epi64(high01, high23);
    x[4 * part + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
}

#elif defined(__AVX2__)

inline Vec::F floats_of(Vec::I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

inline void load_transposed(const void *const *p, Vec::I *x) {
  const auto quarter = [&](int row, int part) {
    return _mm_loadu_si128(static_cast<const __m128i *>(p[row]) + part);
  };
  for (int part = 0; part < 4; ++part) {
    __m256i columns[2][4];
    for (int half = 0; half < 2; ++half) {
      __m256i rows[4];  // rows[i]: part of the rows i, i + 4 of this half
      for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_castsi128_si256(quarter(8 * half + i, part));
        rows[i] = _mm256_inserti128_si256(rows[i], quarter(8 * half + i + 4, part), 1);
      }
      const __m256i low01 = _mm256_unpacklo_epi32(rows[0], rows[1]);
      const __m256i high01 = _mm256_unpackhi_epi32(rows[0], rows[1]);
      const __m256i low23 = _mm256_unpacklo_epi32(rows[2], rows[3]);
      const __m256i high23 = _mm256_unpackhi_epi32(rows[2], rows[3]);
      columns[half][0] = _mm256_unpacklo_epi64(low01, low23);
      columns[half][1] = _mm256_unpackhi_epi64(low01, low23);
      columns[half][2] = _mm256_unpacklo_epi64(high01, high23);
      columns[half][3] = _mm256_unpackhi_epi64(high01, high23);
    }
    for (int i = 0; i < 4; ++i) x[4 * part + i] = {columns[0][i], columns[1][i]};
  }
}

#else

inline Vec::F floats_of(const Vec::I &x) {
  Vec::F y;
  __builtin_memcpy(y.v, x.v, sizeof y.v);
  return y;
}

inline void load_transposed(const void *const *p, Vec::I *x) {
  for (int row = 0; row < 16; ++row) {
    std::uint32_t words[16];
    __builtin_memcpy(words, p[row], sizeof words);
    for (int column = 0; column < 16; ++column) x[column].v[row] = words[column];
  }
}

#endif

}  // namespace
