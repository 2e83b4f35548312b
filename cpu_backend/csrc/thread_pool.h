// One set of compute threads for everything this backend does.
//
// A region is a function that the threads run together; inside, work is handed out item by item
// from atomic counters, and a step is over when its items are done, not when every thread has come
// by. So a thread that sleeps, or that the OS has stopped, delays nothing but an item it holds, and
// one that comes late finds nothing left and helps with the next step. `run` takes part with the
// calling thread: N threads compute on N cores and nobody spins beside them. `submit` has a thread
// of its own call `run`, so that the caller is free to drive a device or a transfer. Threads spin
// briefly between regions, then sleep: layers follow each other within microseconds, requests do
// not.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace moeserve {

class ThreadPool;

// What a thread knows inside a region.
class Worker {
 public:
  Worker(ThreadPool &pool, int index) : pool_(pool), index_(index) {}

  // 0 for the thread that called `run`, up to num_threads - 1.
  int index() const { return index_; }

  // Runs body(item) for the items 0..count-1, each once, on whichever thread is free, and returns
  // when all of them are done. Every thread makes the same calls in the same order, at most
  // kMaxSteps; between them it may only read what earlier steps have written.
  template <class Body>
  void share(std::int64_t count, const Body &body);

  // The same for rows, some that stand together at a time: the hardware reads ahead from one to the
  // next.
  template <class Body>
  void share_rows(std::int64_t count, const Body &body);

  // As `share`, with body(item, next): the item that this thread will run after it, or -1. It is
  // taken one item ahead, so that its data can be asked for meanwhile.
  template <class Body>
  void share_ahead(std::int64_t count, const Body &body);

 private:
  template <class Items>
  void run_step(std::int64_t count, const Items &items);

  ThreadPool &pool_;
  int index_;
  int step_ = 0;  // number of `share` calls so far
};

// The handle of submitted work.
class Ticket {
 public:
  bool done() const { return done_.load(std::memory_order_acquire) != 0; }
  void wait() const { done_.wait(0, std::memory_order_acquire); }

 private:
  friend class ThreadPool;
  std::atomic<std::uint32_t> done_{0};
};

class ThreadPool {
 public:
  // Regions throw nothing: what can fail is checked before they start.
  using Body = std::function<void(Worker &)>;
  static constexpr int kMaxSteps = 8;

  // cpus: a core for every thread to be pinned to, or empty. The first is for the threads that call
  // `run`; of those, only the one behind `submit` is pinned here, because the others are not ours
  // (see pin_this_thread). spin_us: how long idle threads spin before they sleep.
  // Throws std::invalid_argument where num_threads is below 1, cpus has another length or names a
  // core that this process may not use, or the system has no room for so many threads.
  ThreadPool(int num_threads, std::vector<int> cpus, int spin_us);
  ~ThreadPool();  // finishes what was submitted
  ThreadPool(const ThreadPool &) = delete;
  ThreadPool &operator=(const ThreadPool &) = delete;

  int num_threads() const { return num_threads_; }

  // Runs the region with the calling thread among its threads, or, for work too small to call the
  // others (`alone`), with the calling thread only. Regions run one at a time.
  void run(const Body &body, bool alone = false);

  // Queues work, which calls `run`, and returns at once; submitted work is done in its order.
  std::shared_ptr<Ticket> submit(std::function<void()> work);

 private:
  friend class Worker;

  void stop();  // finishes what was submitted, ends the threads
  void serve(int index);
  void dispatch();
  // Waits, spinning first, while `value` is `old`.
  void wait_while(const std::atomic<std::uint32_t> &value, std::uint32_t old) const;

  const int num_threads_;
  const std::vector<int> cpus_;
  const int spin_us_;

  std::mutex run_mutex_;  // held while a region runs
  const Body *body_ = nullptr;
  struct alignas(64) Step {
    std::atomic<std::int64_t> next{0};               // item to be handed out
    alignas(64) std::atomic<std::uint32_t> done{0};  // items that are finished
  };
  Step steps_[kMaxSteps];
  // Odd while a region is open for threads to join. Joining is to count oneself in `num_inside_`
  // and then to look whether the region is still open; closing is to make the number even and then
  // to wait until nobody is inside. Both orders are sequentially consistent, so no thread can be
  // inside a region that its caller has left.
  alignas(64) std::atomic<std::uint32_t> generation_{0};
  alignas(64) std::atomic<std::uint32_t> num_inside_{0};
  std::atomic<bool> closing_{false};
  std::vector<std::thread> threads_;  // of indices 1..num_threads-1

  struct Submitted {
    std::function<void()> work;
    std::shared_ptr<Ticket> ticket;
  };
  std::mutex queue_mutex_;
  std::condition_variable queue_changed_;
  std::deque<Submitted> queue_;
  bool queue_closed_ = false;
  std::thread dispatcher_;  // starts with the first `submit`
};

// Pins a thread to one core, or the calling one. Throw std::invalid_argument where the kernel
// refuses.
void pin_thread(std::thread::native_handle_type thread, int cpu);
void pin_this_thread(int cpu);

template <class Items>
void Worker::run_step(std::int64_t count, const Items &items) {
  ThreadPool::Step &step = pool_.steps_[step_++];
  const std::uint32_t finished = items([&] {
    const std::int64_t item = step.next.fetch_add(1, std::memory_order_relaxed);
    return item < count ? item : -1;
  });
  const auto all = static_cast<std::uint32_t>(count);
  if (finished > 0 && step.done.fetch_add(finished, std::memory_order_acq_rel) + finished == all) {
    step.done.notify_all();
  }
  for (std::uint32_t done; (done = step.done.load(std::memory_order_acquire)) != all;) {
    pool_.wait_while(step.done, done);
  }
}

template <class Body>
void Worker::share(std::int64_t count, const Body &body) {
  run_step(count, [&](const auto &take) {
    std::uint32_t finished = 0;
    for (std::int64_t item; (item = take()) >= 0; ++finished) body(item);
    return finished;
  });
}

template <class Body>
void Worker::share_rows(std::int64_t count, const Body &body) {
  constexpr std::int64_t kMost = 8, kItemsPerThread = 4;
  const std::int64_t wanted = count / (kItemsPerThread * pool_.num_threads());
  const std::int64_t block = wanted < 1 ? 1 : wanted < kMost ? wanted : kMost;
  share((count + block - 1) / block, [&](std::int64_t item) {
    const std::int64_t end = (item + 1) * block < count ? (item + 1) * block : count;
    for (std::int64_t row = item * block; row < end; ++row) body(row);
  });
}

template <class Body>
void Worker::share_ahead(std::int64_t count, const Body &body) {
  run_step(count, [&](const auto &take) {
    std::uint32_t finished = 0;
    for (std::int64_t item = take(), next; item >= 0; item = next, ++finished) {
      next = take();
      body(item, next);
    }
    return finished;
  });
}

}  // namespace moeserve
