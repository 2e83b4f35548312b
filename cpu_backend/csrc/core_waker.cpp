#include "core_waker.h"

#include <cerrno>
#include <chrono>
#include <system_error>

#include "relax.h"
#include "thread_pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace moeserve {
namespace {

// From now on the thread runs only when nothing else wants to.
void make_idle(std::thread &thread) {
#if defined(__linux__)
  const sched_param param{};
  const int error = pthread_setschedparam(thread.native_handle(), SCHED_IDLE, &param);
#else
  (void)thread;
  const int error = ENOTSUP;
#endif
  if (error != 0) throw std::system_error(error, std::generic_category(), "SCHED_IDLE");
}

}  // namespace

CoreWaker::CoreWaker(const std::vector<int> &cpus, int most_us) : most_us_(most_us) {
  try {
    for (const int cpu : cpus) {
      threads_.emplace_back([this] { serve(); });
      pin_thread(threads_.back().native_handle(), cpu);
      make_idle(threads_.back());
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
