#include "cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>

namespace moeserve {

#if defined(__x86_64__)
namespace {

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return Registers{};
  return r;
}

// XCR0: the register files that the OS saves on a context switch. Without that, using them
// corrupts other processes' state, so the CPU flag alone is not enough.
std::uint64_t saved_state_components() {
  if (!(cpuid(1, 0).ecx & bit_OSXSAVE)) return 0;
  std::uint32_t low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// AMX tile data is off until a process asks (arch_prctl ARCH_REQ_XCOMP_PERM, Linux 5.16).
bool request_amx_permission() {
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileDataComponent = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileDataComponent) == 0;
}

bool has(std::uint64_t word, int bit) { return (word >> bit) & 1; }

}  // namespace

std::vector<std::string> usable_isa_extensions() {
  const std::uint64_t saved = saved_state_components();
  const bool ymm = (saved & 0x6) == 0x6;            // SSE and AVX state
  const bool zmm = ymm && (saved & 0xE0) == 0xE0;   // opmask, upper halves, zmm16-31
  const bool tiles = (saved & 0x60000) == 0x60000;  // XTILECFG, XTILEDATA
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);

  std::vector<std::string> names;
  const auto add = [&names](bool usable, const char *name) {
    if (usable) names.emplace_back(name);
  };
  add(ymm && has(seven.ebx, 5), "avx2");
  add(ymm && has(one.ecx, 12), "fma");
  add(ymm && has(one.ecx, 29), "f16c");
  add(zmm && has(seven.ebx, 16), "avx512f");
  add(zmm && has(seven.ebx, 17), "avx512dq");
  add(zmm && has(seven.ebx, 30), "avx512bw");
  add(zmm && has(seven.ebx, 31), "avx512vl");
  add(zmm && has(seven.ecx, 11), "avx512_vnni");
  add(zmm && has(seven_one.eax, 5), "avx512_bf16");
  add(ymm && has(seven_one.eax, 4), "avx_vnni");
  if (tiles && has(seven.edx, 24) && request_amx_permission()) {
    add(true, "amx_tile");
    add(has(seven.edx, 25), "amx_int8");
    add(has(seven.edx, 22), "amx_bf16");
  }
  return names;
}
#else
std::vector<std::string> usable_isa_extensions() { return {}; }
#endif

}  // namespace moeserve
