#include "core_waker.h"

#include <cerrno>
#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>

#include "relax.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace moeserve {
namespace {

// An errno value; 0 where the thread may now only run on that core when nothing else wants to.
int make_idle(std::thread &thread, int cpu) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  const int error = pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
  if (error != 0) {
    throw std::invalid_argument("cpus: cannot pin a thread to core " + std::to_string(cpu) + ": " +
                                std::generic_category().message(error));
  }
  const sched_param param{};
  return pthread_setschedparam(thread.native_handle(), SCHED_IDLE, &param);
#else
  (void)thread, (void)cpu;
  return ENOTSUP;
#endif
}

}  // namespace

CoreWaker::CoreWaker(const std::vector<int> &cpus, int most_us) : most_us_(most_us) {
  try {
    for (const int cpu : cpus) {
      threads_.emplace_back([this] { serve(); });
      const int error = make_idle(threads_.back(), cpu);
      if (error != 0) throw std::system_error(error, std::generic_category(), "SCHED_IDLE");
    }
  } catch (...) {
    stop();
    throw;
  }
}

void CoreWaker::stop() {
  closing_.store(true, std::memory_order_release);
  turn_.fetch_add(1, std::memory_order_release);
  turn_.notify_all();
  for (auto &thread : threads_) thread.join();
  threads_.clear();
}

void CoreWaker::begin() {
  turn_.fetch_add(1, std::memory_order_release);
  turn_.notify_all();
}

void CoreWaker::end() { turn_.fetch_add(1, std::memory_order_release); }

void CoreWaker::serve() {
  using Clock = std::chrono::steady_clock;
  for (std::uint32_t seen = 0;;) {
    turn_.wait(seen, std::memory_order_acquire);
    seen = turn_.load(std::memory_order_acquire);
    if (closing_.load(std::memory_order_acquire)) return;
    if (seen % 2 == 0) continue;
    const auto give_up = Clock::now() + std::chrono::microseconds(most_us_);
    do {
      for (int i = 0; i < 64 && turn_.load(std::memory_order_acquire) == seen; ++i) relax();
    } while (turn_.load(std::memory_order_acquire) == seen && Clock::now() < give_up);
  }
}

}  // namespace moeserve
