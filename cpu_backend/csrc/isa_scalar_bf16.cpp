// Plain C++ that multiplies pairs of bf16 as the bf16 instructions do: no level to choose, but what
// tests on machines without those instructions compare.
#define MOESERVE_BF16_DOT
#include "kernels.h"

#if 1
#define MOESERVE_ATTENTION_ELSEWHERE
#include "vec_scalar.h"
// The table's templates need the Vec above.
#include "kernel_table.h"

namespace moeserve {

const Kernels *scalar_bf16_kernels() {
  static const Kernels kTable = [] {
    Kernels table = make_table("scalar_bf16");
    table.attention = scalar_kernels()->attention;
    return table;
  }();
  return &kTable;
}

}  // namespace moeserve
#else
namespace moeserve {

const Kernels *scalar_bf16_kernels() { return nullptr; }

}  // namespace moeserve
#endif
