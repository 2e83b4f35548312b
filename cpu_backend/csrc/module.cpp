#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "cpu_features.h"

NB_MODULE(_native, m) {
  m.doc() = "Compiled parts of the CPU backend.";
  m.def("usable_isa_extensions", &moeserve::usable_isa_extensions,
        "Instruction-set extensions that this process may execute, in /proc/cpuinfo spelling.");
  moeserve::bind_runtime(m);
  moeserve::bind_packing(m);
  moeserve::bind_products(m);
  moeserve::bind_attention(m);
  moeserve::bind_decoder(m);
  moeserve::bind_predictor(m);
  moeserve::bind_markov(m);
  moeserve::bind_huge_pages(m);
}
