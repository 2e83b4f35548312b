// Where the time of a step goes, by part. Two looks at the clock for each part of a call: some 50
// ns beside the microseconds that the smallest of them takes.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace moeserve {

enum class Part : int {
  kNorm,        // norms and sums of the residual stream
  kProjection,  // linear layers of attention
  kHeads,       // norm and rotation of heads
  kAttention,
  kRouter,
  kRows,    // rows of x for experts: rounded, sorted
  kGateUp,  // with the activation
  kHidden,  // rows between an expert's products: rounded
  kDown,    // with the sum over experts
};
constexpr std::array<const char *, 9> kPartNames = {"norms",     "projections", "heads",
                                                    "attention", "router",      "expert rows",
                                                    "gate, up",  "hidden rows", "down"};

// Sums since they were last taken. Parts that run beside each other each count in full.
class PartTimes {
 public:
  void add(Part part, std::int64_t ns) {
    ns_[static_cast<std::size_t>(part)].fetch_add(ns, std::memory_order_relaxed);
  }
  // Seconds, in the order of kPartNames; starts anew.
  std::array<double, kPartNames.size()> take() {
    std::array<double, kPartNames.size()> out = {};
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = 1e-9 * static_cast<double>(ns_[i].exchange(0, std::memory_order_relaxed));
    }
    return out;
  }

 private:
  std::array<std::atomic<std::int64_t>, kPartNames.size()> ns_ = {};
};

// Laps of one thread through the parts of a call.
class Laps {
 public:
  // on: false for threads whose time is not counted.
  explicit Laps(PartTimes &times, bool on = true) : times_(times), on_(on) {
    if (on_) start_ = now();
  }
  // Leaves out what ran since the last lap.
  void skip() {
    if (on_) start_ = now();
  }
  // What ran since the last lap was `part`.
  void end(Part part) {
    if (!on_) return;
    const std::int64_t time = now();
    times_.add(part, time - start_);
    start_ = time;
  }

 private:
  static std::int64_t now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
  }

  PartTimes &times_;
  bool on_;
  std::int64_t start_ = 0;
};

}  // namespace moeserve
