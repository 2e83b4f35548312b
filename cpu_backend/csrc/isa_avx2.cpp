// AVX2 with FMA and F16C.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vec_avx2.h"
// The table's templates need the Vec above.
#include "kernel_table.h"

namespace moeserve {

const Kernels *avx2_kernels() {
  static constexpr Kernels kTable = make_table("avx2");
  return &kTable;
}

}  // namespace moeserve
#else
namespace moeserve {

const Kernels *avx2_kernels() { return nullptr; }

}  // namespace moeserve
#endif
