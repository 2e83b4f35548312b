// Keeps cores from halting while a step waits.
//
// A core that nothing runs on halts, and takes a while to come back: on a virtual machine its host
// does something else meanwhile, on any the clock falls. What comes after a stall of milliseconds
// then takes longer: waking, Python, the first products. So threads of the kernel's idle policy
// (sched(7), SCHED_IDLE) spin meanwhile: whatever else has work on their core gets it at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace moeserve {

class CoreWaker {
 public:
  // One thread for each of the cores, pinned to it. most_us: of a wait, through which they spin; in
  // a longer one they sleep.
  // Throws std::invalid_argument for a core that this process may not use, std::system_error where
  // the system refuses the policy or the threads.
  CoreWaker(const std::vector<int> &cpus, int most_us);
  ~CoreWaker() { stop(); }
  CoreWaker(const CoreWaker &) = delete;
  CoreWaker &operator=(const CoreWaker &) = delete;

  // A wait begins, or ends. For one thread, in turns.
  void begin();
  void end();

 private:
  void serve();
  void stop();

  const int most_us_;
  std::atomic<std::uint32_t> turn_{0};  // odd during a wait
  std::atomic<bool> closing_{false};
  std::vector<std::thread> threads_;
};

}  // namespace moeserve
