// Sixteen lanes in plain C++: any machine runs it, and it is short enough to be the reference that
// the other levels are tested against. See vec_avx512.h for what each function does.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace {

struct Vec {
  static constexpr int kLanes = 16;
  struct F {
    float v[kLanes];
  };
  struct I {
    std::uint32_t v[kLanes];
  };
  static constexpr int kRegisters = 4;
#if defined(MOESERVE_BF16_DOT)
  static constexpr bool kHasBf16Dot = true;  // the arithmetic of such a level, for its tests
#else
  static constexpr bool kHasBf16Dot = false;
#endif

  static F zero() { return set1(0.0f); }
  static F set1(float x) {
    return each([&](int) { return x; });
  }
  static F load(const float *p) {
    return each([&](int i) { return p[i]; });
  }
  static void store(float *p, const F &x) {
    for (int i = 0; i < kLanes; ++i) p[i] = x.v[i];
  }
  static F add(const F &a, const F &b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(const F &a, const F &b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(const F &a, const F &b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(const F &a, const F &b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  // As the x86 instructions: the second operand where either is NaN.
  static F min(const F &a, const F &b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F max(const F &a, const F &b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  // Two roundings: std::fma without the instruction is a library call of a hundred cycles.
  static F fma(const F &a, const F &b, const F &c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static F round(const F &a) {
    return each([&](int i) { return std::nearbyintf(a.v[i]); });
  }
  static F abs(const F &a) {
    return each([&](int i) { return std::fabs(a.v[i]); });
  }
  static F scale_pow2(const F &a, const F &n) {
    return each([&](int i) { return std::ldexp(a.v[i], static_cast<int>(n.v[i])); });
  }
  static float sum(const F &a) {
    float t[8];
    for (int i = 0; i < 8; ++i) t[i] = a.v[i] + a.v[i + 8];
    for (int i = 0; i < 4; ++i) t[i] += t[i + 4];
    return (t[0] + t[2]) + (t[1] + t[3]);
  }
  static float largest(const F &a) {
    float best = a.v[0];
    for (int i = 1; i < kLanes; ++i) best = best > a.v[i] ? best : a.v[i];
    return best;
  }
  static F first_lanes(const F &a, int count, const F &b) {
    return each([&](int i) { return i < count ? a.v[i] : b.v[i]; });
  }

  static F load_bf16(const std::uint16_t *p) {
    return each([&](int i) { return from_bits(static_cast<std::uint32_t>(p[i]) << 16); });
  }
  static void store_bf16(std::uint16_t *p, const F &x) {
    for (int i = 0; i < kLanes; ++i) {
      const std::uint32_t bits = to_bits(x.v[i]);
      const bool nan = x.v[i] != x.v[i];
      p[i] = static_cast<std::uint16_t>(
          (nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
  }
  static F load_f16(const std::uint16_t *p) {
    return each([&](int i) { return half_to_float(p[i]); });
  }
  static void store_f16(std::uint16_t *p, const F &x) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(x.v[i]);
  }

  static I load64(const std::uint8_t *p) {
    I x;
    __builtin_memcpy(x.v, p, 64);
    return x;
  }
  static void store64(std::uint8_t *p, const I &x) { __builtin_memcpy(p, x.v, 64); }
  static I iset1(std::int32_t x) {
    return ieach([&](int) { return static_cast<std::uint32_t>(x); });
  }
  static F to_float(const I &a) {
    return each([&](int i) { return static_cast<float>(static_cast<std::int32_t>(a.v[i])); });
  }
  static I load_u8(const std::uint8_t *p) {
    return ieach([&](int i) { return std::uint32_t{p[i]}; });
  }
  static void store_s8(std::int8_t *p, const F &x) {
    for (int i = 0; i < kLanes; ++i) {
      const float r = std::nearbyintf(x.v[i]);
      p[i] = static_cast<std::int8_t>(r < -128.0f ? -128.0f : r > 127.0f ? 127.0f : r);
    }
  }

  static F bf16_even(const I &x) {
    return each([&](int i) { return from_bits(x.v[i] << 16); });
  }
  static F bf16_odd(const I &x) {
    return each([&](int i) { return from_bits(x.v[i] & 0xffff0000u); });
  }
  template <int J>
  static F byte_at(const I &x, std::int32_t zero) {
    return each([&](int i) {
      return static_cast<float>(static_cast<std::int32_t>((x.v[i] >> (8 * J)) & 0xffu) - zero);
    });
  }
  struct Table {
    float v[kLanes];
  };
  static Table table(const float *p) {
    Table t;
    for (int i = 0; i < kLanes; ++i) t.v[i] = p[i];
    return t;
  }
  template <int J>
  static F nibble_at(const I &x, const Table &t) {
    constexpr int shift = 8 * (J % 4) + 4 * (J / 4);
    return each([&](int i) { return t.v[(x.v[i] >> shift) & 15u]; });
  }
  static F load_e4m3_scaled(const std::uint8_t *p) {
    return each([&](int i) {
      const unsigned half = ((p[i] & 0x7fu) << 7) | ((p[i] & 0x80u) << 8);
      return half_to_float(static_cast<std::uint16_t>(half));
    });
  }

  static I low_nibbles(const I &x) {
    return ieach([&](int i) { return x.v[i] & 0x0f0f0f0fu; });
  }
  static I high_nibbles(const I &x) {
    return ieach([&](int i) { return (x.v[i] >> 4) & 0x0f0f0f0fu; });
  }
  static I byte_table(const std::uint8_t *p) {
    I t = {};
    __builtin_memcpy(t.v, p, 16);
    return t;
  }
  static I look_up(const I &t, const I &index) {
    std::uint8_t values[16];
    __builtin_memcpy(values, t.v, 16);
    return ieach([&](int i) {
      std::uint32_t out = 0;
      for (int b = 0; b < 32; b += 8) {
        out |= std::uint32_t{values[(index.v[i] >> b) & 15u]} << b;
      }
      return out;
    });
  }

  struct Broadcast {
    std::int8_t v[4];
  };
  static Broadcast broadcast4(const std::int8_t *p) { return {{p[0], p[1], p[2], p[3]}}; }
  static I dot(const I &acc, const I &codes, const Broadcast &x) {
    return ieach([&](int i) {
      std::int32_t sum = static_cast<std::int32_t>(acc.v[i]);
      for (int j = 0; j < 4; ++j) {
        sum += static_cast<std::int32_t>((codes.v[i] >> (8 * j)) & 0xffu) * x.v[j];
      }
      return static_cast<std::uint32_t>(sum);
    });
  }
  static I mul_small(const I &a, std::int32_t b) {
    return ieach([&](int i) { return a.v[i] * static_cast<std::uint32_t>(b); });
  }

  static I load_s8_low(const std::int8_t *p) {
    return ieach([&](int i) { return static_cast<std::uint32_t>(p[i]) & 0xffffu; });
  }
  static F load_s8(const std::int8_t *p) {
    return each([&](int i) { return static_cast<float>(p[i]); });
  }
  static I mul_add_small(const I &acc, const I &a, const I &b) {
    return ieach([&](int i) {
      return acc.v[i] + a.v[i] * static_cast<std::uint32_t>(static_cast<std::int16_t>(b.v[i]));
    });
  }

  struct Factor {
    std::int32_t v[kLanes];
  };
  static Factor load_factor(const std::int8_t *p) {
    Factor f;
    for (int i = 0; i < kLanes; ++i) f.v[i] = p[i];
    return f;
  }
  static void scale_nibbles(const I &raw, const Factor &f, I &low, I &high) {
    const auto scaled = [&](int shift) {
      return ieach([&](int i) {
        std::uint32_t out = 0;
        for (int b = 0; b < 32; b += 8) {
          const auto code = static_cast<std::int32_t>((raw.v[i] >> (b + shift)) & 15u);
          out |= (static_cast<std::uint32_t>(f.v[i] * (code - 8) + 128) & 0xffu) << b;
        }
        return out;
      });
    };
    low = scaled(0);
    high = scaled(4);
  }

  static F bf16_dot(const F &acc, const I &raw, const std::uint16_t *pair) {
    const F low = set1(from_bits(static_cast<std::uint32_t>(pair[0]) << 16));
    const F high = set1(from_bits(static_cast<std::uint32_t>(pair[1]) << 16));
    return fma(bf16_even(raw), low, fma(bf16_odd(raw), high, acc));
  }

  static void prefetch(const void *) {}

 private:
  template <class Function>
  static F each(Function f) {
    F x;
    for (int i = 0; i < kLanes; ++i) x.v[i] = f(i);
    return x;
  }
  template <class Function>
  static I ieach(Function f) {
    I x;
    for (int i = 0; i < kLanes; ++i) x.v[i] = f(i);
    return x;
  }
  static float from_bits(std::uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
  }
  static std::uint32_t to_bits(float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
  }
  static float half_to_float(std::uint16_t h) {
    const std::uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u;
    const std::uint32_t fraction = h & 0x3ffu;
    if (exponent == 31) return from_bits(sign | 0x7f800000u | (fraction << 13));
    if (exponent != 0) return from_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  static std::uint16_t float_to_half(float x) {
    const std::uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      return static_cast<std::uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    }
    if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // below the smallest normal: a multiple of 2^-24
      const float scaled = std::nearbyintf(from_bits(magnitude) * 0x1p24f);
      return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(scaled));
    }
    const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
};

}  // namespace
