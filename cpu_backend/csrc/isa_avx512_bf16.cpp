// AVX-512 with VNNI and BF16: products of bf16 pairs in one instruction.
#include "kernels.h"

#if defined(__AVX512BF16__)
#include "vec_avx512.h"
// The table's templates need the Vec above.
#include "kernel_table.h"

namespace moeserve {

const Kernels *avx512_bf16_kernels() {
  static constexpr Kernels kTable = make_table("avx512_bf16");
  return &kTable;
}

}  // namespace moeserve
#else
namespace moeserve {

const Kernels *avx512_bf16_kernels() { return nullptr; }

}  // namespace moeserve
#endif
