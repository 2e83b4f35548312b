#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu_features.h"

NB_MODULE(_native, m) {
  m.doc() = "Compiled parts of the CPU backend.";
  m.def("usable_isa_extensions", &moeserve::usable_isa_extensions,
        "Instruction-set extensions that this process may execute, in /proc/cpuinfo spelling.");
}
