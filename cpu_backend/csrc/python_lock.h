// Python's lock while a call computes.
//
// To get the lock back from a thread that holds it, such as one that has just read a record, takes
// 20 to 30 us, and a step waits that long. So a call gives it up only for work that takes longer:
// one mechanism for all calls, which say how much they read.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>

namespace moeserve {

// What one thread reads from memory in some 15 us. Who waits for the lock meanwhile waits no longer
// than for a few lines of Python.
constexpr std::int64_t kBriefBytes = 256 * 1024;

// Gives up the lock for as long as it lives, unless the work is brief.
class PythonLockGivenUp {
 public:
  explicit PythonLockGivenUp(bool is_brief) {
    if (!is_brief) given_up_.emplace();
  }
  // num_rows: that are multiplied with what is read, `read_bytes` for each.
  PythonLockGivenUp(std::int64_t num_rows, std::size_t read_bytes)
      : PythonLockGivenUp(num_rows * static_cast<std::int64_t>(read_bytes) < kBriefBytes) {}

 private:
  std::optional<nanobind::gil_scoped_release> given_up_;
};

}  // namespace moeserve
