// Rounding that every compiler makes vector code of.
#pragma once

namespace moeserve {

// To the nearest integer, halves to even, for magnitudes below 2^22: there is no such number with a
// fraction left after the addition. Unlike std::nearbyint it becomes vector code on any CPU.
inline float round_small(float x) {
  constexpr float kNoFraction = 0x1.8p23f;
  return (x + kNoFraction) - kNoFraction;
}

}  // namespace moeserve
