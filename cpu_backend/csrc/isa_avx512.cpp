// AVX-512 F, BW, VL and DQ.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include "vec_avx512.h"
// The table's templates need the Vec above.
#include "kernel_table.h"

namespace moeserve {

const Kernels *avx512_kernels() {
  static constexpr Kernels kTable = make_table("avx512");
  return &kTable;
}

}  // namespace moeserve
#else
namespace moeserve {

const Kernels *avx512_kernels() { return nullptr; }

}  // namespace moeserve
#endif
