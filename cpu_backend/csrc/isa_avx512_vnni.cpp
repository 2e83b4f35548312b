// AVX-512 with VNNI: products of bytes in one instruction.
#include "kernels.h"

#if defined(__AVX512VNNI__)
// Attention multiplies floats only; that of plain AVX-512 serves all levels above it.
#define MOESERVE_ATTENTION_ELSEWHERE
#include "vec_avx512.h"
// The table's templates need the Vec above.
#include "kernel_table.h"

namespace moeserve {

const Kernels *avx512_vnni_kernels() {
  static const Kernels kTable = [] {
    Kernels table = make_table("avx512_vnni");
    table.attention = avx512_kernels()->attention;
    return table;
  }();
  return &kTable;
}

}  // namespace moeserve
#else
namespace moeserve {

const Kernels *avx512_vnni_kernels() { return nullptr; }

}  // namespace moeserve
#endif
