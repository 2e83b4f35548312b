// The choice of an ISA level, once at start.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace moeserve {

struct IsaLevel {
  std::string name;
  const Kernels *kernels;            // null: not in this build
  std::vector<std::string> missing;  // extensions that this process may not use
  bool usable() const { return kernels != nullptr && missing.empty(); }
};

// From the plainest to the fastest.
std::vector<IsaLevel> isa_levels();

// The kernels called `name`. Throws std::invalid_argument with the reason where they cannot run
// here: running them would be an illegal instruction.
const Kernels &find_kernels(const std::string &name);

}  // namespace moeserve
