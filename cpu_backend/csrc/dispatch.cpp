#include "dispatch.h"

#include <algorithm>
#include <stdexcept>

#include "cpu_features.h"

namespace moeserve {
namespace {

std::string join(const std::vector<std::string> &names) {
  std::string all;
  for (const auto &name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

}  // namespace

std::vector<IsaLevel> isa_levels() {
  const std::vector<std::string> avx2 = {"avx2", "fma", "f16c"};
  const std::vector<std::string> avx512 = {"avx2",     "fma",      "f16c",    "avx512f",
                                           "avx512bw", "avx512vl", "avx512dq"};
  auto vnni = avx512;
  vnni.push_back("avx512_vnni");
  auto bf16 = vnni;
  bf16.push_back("avx512_bf16");
  auto amx = bf16;
  amx.insert(amx.end(), {"amx_tile", "amx_int8", "amx_bf16"});

  std::vector<IsaLevel> levels = {{"scalar", scalar_kernels(), {}},
                                  {"avx2", avx2_kernels(), avx2},
                                  {"avx512", avx512_kernels(), avx512},
                                  {"avx512_vnni", avx512_vnni_kernels(), vnni},
                                  {"avx512_bf16", avx512_bf16_kernels(), bf16},
                                  {"amx", amx_kernels(), amx}};
  const std::vector<std::string> usable = usable_isa_extensions();
  for (auto &level : levels) {
    std::erase_if(level.missing, [&](const std::string &name) {
      return std::find(usable.begin(), usable.end(), name) != usable.end();
    });
  }
  return levels;
}

const Kernels &find_kernels(const std::string &name) {
  if (name == "scalar_bf16") return *scalar_bf16_kernels();  // for tests
  std::vector<std::string> usable;
  for (const IsaLevel &level : isa_levels()) {
    if (level.usable()) usable.push_back(level.name);
    if (level.name != name || level.usable()) continue;
    throw std::invalid_argument("isa: " + name + " cannot run here: " +
                                (level.kernels == nullptr
                                     ? "this build does not have it"
                                     : "the CPU or the kernel lacks " + join(level.missing)));
  }
  for (const IsaLevel &level : isa_levels()) {
    if (level.name == name) return *level.kernels;
  }
  throw std::invalid_argument("isa: '" + name + "' is none of " + join(usable));
}

}  // namespace moeserve
