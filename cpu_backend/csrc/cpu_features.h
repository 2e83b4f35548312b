// Which instruction sets this process may execute: what the CPU has, the OS saves, and the kernel
// permits. The answer never depends on how this file was compiled.
#pragma once

#include <string>
#include <vector>

namespace moeserve {

// Names in the spelling of /proc/cpuinfo, sorted from old to new; empty on other architectures.
std::vector<std::string> usable_isa_extensions();

}  // namespace moeserve
