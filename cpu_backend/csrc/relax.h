#pragma once

namespace moeserve {

// A hint to the core that this loop waits; without it, leaving the loop costs a pipeline flush.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

}  // namespace moeserve
