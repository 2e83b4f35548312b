// Plain C++, for any machine.
#include "kernels.h"

#if 1
#include "vec_scalar.h"
// The table's templates need the Vec above.
#include "kernel_table.h"

namespace moeserve {

const Kernels *scalar_kernels() {
  static constexpr Kernels kTable = make_table("scalar");
  return &kTable;
}

}  // namespace moeserve
#else
namespace moeserve {

const Kernels *scalar_kernels() { return nullptr; }

}  // namespace moeserve
#endif
