// Of what is predicted, what a prefetch could bring: experts that are absent and likelier than one
// taken at random. Asked for in every layer of a step over the disk, while nothing else runs.
#pragma once

#include <cstdint>
#include <vector>

namespace moeserve {

struct LikelyAbsent {
  int layer;       // its place among those that were asked about
  double total;    // of all chances
  int num_absent;  // of the likeliest experts, as many as will be wanted: `total`, rounded, at
                   // least 1
  std::vector<std::int64_t> experts;  // likeliest first, of equals the lower number
  std::vector<float> chances;
};

// chances, absent: of the experts of one layer after the other. Layers without such an expert are
// left out.
std::vector<LikelyAbsent> likely_absent(const float *chances, const bool *absent,
                                        const std::vector<std::int64_t> &sizes);

}  // namespace moeserve
