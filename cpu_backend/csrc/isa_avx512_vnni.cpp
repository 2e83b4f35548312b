// AVX-512 with VNNI: products of bytes in one instruction.
#include "kernels.h"

#if defined(__AVX512VNNI__)
#include "vec_avx512.h"
// The table's templates need the Vec above.
#include "kernel_table.h"

namespace moeserve {

const Kernels *avx512_vnni_kernels() {
  static constexpr Kernels kTable = make_table("avx512_vnni");
  return &kTable;
}

}  // namespace moeserve
#else
namespace moeserve {

const Kernels *avx512_vnni_kernels() { return nullptr; }

}  // namespace moeserve
#endif
