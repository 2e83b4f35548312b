#include "thread_pool.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "relax.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace moeserve {

void pin_thread(std::thread::native_handle_type thread, int cpu) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  const int error = pthread_setaffinity_np(thread, sizeof set, &set);
  if (error != 0) {
    throw std::invalid_argument("cpus: cannot pin a thread to core " + std::to_string(cpu) + ": " +
                                std::generic_category().message(error));
  }
#else
  (void)thread, (void)cpu;  // no such call; the OS places threads
#endif
}

void pin_this_thread(int cpu) {
#if defined(__linux__)
  pin_thread(pthread_self(), cpu);
#else
  (void)cpu;
#endif
}

namespace {

// Pins the calling thread to one core after the other and then back where it was: in a thread of
// the pool, failing would end the process.
void try_cpus(const std::vector<int> &cpus) {
#if defined(__linux__)
  if (cpus.empty()) return;
  struct Restored {
    cpu_set_t set;
    Restored() { pthread_getaffinity_np(pthread_self(), sizeof set, &set); }
    ~Restored() { pthread_setaffinity_np(pthread_self(), sizeof set, &set); }
  };
  const Restored restored;
  for (const int cpu : cpus) pin_this_thread(cpu);
#else
  (void)cpus;
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads, std::vector<int> cpus, int spin_us)
    : num_threads_(num_threads), cpus_(std::move(cpus)), spin_us_(spin_us) {
  if (num_threads < 1) throw std::invalid_argument("num_threads: less than 1");
  if (!cpus_.empty() && cpus_.size() != static_cast<std::size_t>(num_threads)) {
    throw std::invalid_argument("cpus: " + std::to_string(cpus_.size()) + " cores for " +
                                std::to_string(num_threads) + " threads");
  }
  try_cpus(cpus_);
  try {
    for (int index = 1; index < num_threads; ++index) {
      threads_.emplace_back([this, index] { serve(index); });
    }
  } catch (const std::system_error &error) {
    const std::size_t started = threads_.size();
    stop();
    throw std::invalid_argument("num_threads: " + std::to_string(num_threads) +
                                "; the system refuses more than " + std::to_string(started) + ": " +
                                error.what());
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    queue_closed_ = true;
  }
  queue_changed_.notify_all();
  if (dispatcher_.joinable()) dispatcher_.join();
  closing_.store(true, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (auto &thread : threads_) thread.join();
}

void ThreadPool::wait_while(const std::atomic<std::uint32_t> &value, std::uint32_t old) const {
  using Clock = std::chrono::steady_clock;
  const auto give_up = Clock::now() + std::chrono::microseconds(spin_us_);
  do {
    for (int i = 0; i < 64; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
  } while (Clock::now() < give_up);
  value.wait(old, std::memory_order_acquire);
}

void ThreadPool::run(const Body &body, bool alone) {
  const std::lock_guard<std::mutex> lock(run_mutex_);
  for (Step &step : steps_) {
    step.next.store(0, std::memory_order_relaxed);
    step.done.store(0, std::memory_order_relaxed);
  }
  body_ = &body;
  const bool open = !alone && num_threads_ > 1;
  if (open) {
    generation_.fetch_add(1);
    generation_.notify_all();
  }
  Worker worker(*this, 0);
  body(worker);
  if (open) {
    generation_.fetch_add(1);
    for (std::uint32_t inside; (inside = num_inside_.load()) != 0;) wait_while(num_inside_, inside);
  }
}

void ThreadPool::serve(int index) {
  if (!cpus_.empty()) pin_this_thread(cpus_[static_cast<std::size_t>(index)]);
  for (std::uint32_t seen = 0;;) {
    wait_while(generation_, seen);
    seen = generation_.load();
    if (closing_.load(std::memory_order_acquire)) return;
    num_inside_.fetch_add(1);
    if (seen % 2 == 1 && generation_.load() == seen) {
      Worker worker(*this, index);
      (*body_)(worker);
    }
    if (num_inside_.fetch_sub(1) == 1) num_inside_.notify_all();
  }
}

std::shared_ptr<Ticket> ThreadPool::submit(std::function<void()> work) {
  auto ticket = std::make_shared<Ticket>();
  {
    const std::lock_guard<std::mutex> lock(queue_mutex_);
    queue_.push_back({std::move(work), ticket});
    if (!dispatcher_.joinable()) dispatcher_ = std::thread([this] { dispatch(); });
  }
  queue_changed_.notify_one();
  return ticket;
}

void ThreadPool::dispatch() {
  if (!cpus_.empty()) pin_this_thread(cpus_[0]);
  for (;;) {
    Submitted next;
    {
      std::unique_lock<std::mutex> lock(queue_mutex_);
      queue_changed_.wait(lock, [this] { return queue_closed_ || !queue_.empty(); });
      if (queue_.empty()) return;
      next = std::move(queue_.front());
      queue_.pop_front();
    }
    next.work();
    next.ticket->done_.store(1, std::memory_order_release);
    next.ticket->done_.notify_all();
  }
}

}  // namespace moeserve
