// Runtime, ISA levels, memory, and measurements of the machine.
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings.h"
#include "core_waker.h"
#include "dispatch.h"
#include "row_pool.h"
#include "runtime.h"

namespace nb = nanobind;

namespace moeserve {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

// Zeroed memory, aligned to huge pages and backed by them where the system allows. Pages become
// real, on the node of the thread that does it, when they are first written.
class Memory {
 public:
  explicit Memory(std::size_t num_bytes)
      : size_((num_bytes + kHugePage - 1) / kHugePage * kHugePage) {
#if defined(__linux__)
    void *reserved = mmap(nullptr, size_ + kHugePage, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<std::uint8_t *>(reserved);
    const auto address = reinterpret_cast<std::uintptr_t>(base_);
    data_ = base_ + (kHugePage - address % kHugePage) % kHugePage;
    madvise(data_, size_, MADV_HUGEPAGE);  // a hint: refused where huge pages are off
#else
    base_ = data_ = static_cast<std::uint8_t *>(std::aligned_alloc(kHugePage, size_));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, size_);
#endif
  }
  ~Memory() {
#if defined(__linux__)
    munmap(base_, size_ + kHugePage);
#else
    std::free(base_);
#endif
  }
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;
  std::uint8_t *data() const { return data_; }

 private:
  std::size_t size_;
  std::uint8_t *base_;
  std::uint8_t *data_;
};

nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>> allocate(std::size_t num_bytes) {
  auto *memory = new Memory(num_bytes);
  nb::capsule owner(memory, [](void *p) noexcept { delete static_cast<Memory *>(p); });
  return {memory->data(), {num_bytes}, owner};
}

// A pool as Python has it. Tensors keep the pool, not this: some live until the interpreter is
// gone.
struct HeldRowPool {
  std::shared_ptr<RowPool> pool = std::make_shared<RowPool>();
};

// What a tensor keeps of its pool, which it may outlive.
struct TakenBlock {
  std::shared_ptr<RowPool> pool;
  RowPool::Block block;
  ~TakenBlock() { pool->give_back(block); }
};

nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>> take_rows(const HeldRowPool &held,
                                                            std::size_t num_bytes) {
  if (num_bytes == 0) refuse("num_bytes", "must be 1 or more");
  auto *taken = new TakenBlock{held.pool, held.pool->take(num_bytes)};
  nb::capsule owner(taken, [](void *p) noexcept { delete static_cast<TakenBlock *>(p); });
  return {static_cast<std::uint8_t *>(taken->block.memory), {num_bytes}, owner};
}

double seconds() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

template <class Work>
double shortest(int repeats, const Work &work) {
  double best = 1e300;
  for (int i = 0; i < repeats; ++i) {
    const double start = seconds();
    work();
    best = std::min(best, seconds() - start);
  }
  return best;
}

constexpr std::size_t kReadItem = 256 * 1024;

// body(start of an item), by all threads.
template <class Data, class Body>
void for_items(Runtime &runtime, Data *data, std::size_t items, const Body &body) {
  runtime.pool.run([&](Worker &worker) {
    worker.share(static_cast<std::int64_t>(items), [&](std::int64_t item) {
      body(data + static_cast<std::size_t>(item) * kReadItem);
    });
  });
}

double read_rate(Runtime &runtime, const std::uint8_t *data, std::size_t items, int repeats) {
  const double best = shortest(repeats, [&] {
    for_items(runtime, data, items, [&](const std::uint8_t *item) {
      volatile float kept = runtime.kernels.read_all(item, kReadItem);
      (void)kept;
    });
  });
  return static_cast<double>(items * kReadItem) / best;
}

double measure_read_bandwidth(Runtime &runtime, std::size_t num_bytes, int repeats) {
  const std::size_t items = std::max<std::size_t>(1, num_bytes / kReadItem);
  const nb::gil_scoped_release release;
  const Memory memory(items * kReadItem);
  for_items(runtime, memory.data(), items,
            [](std::uint8_t *item) { std::memset(item, 1, kReadItem); });
  return read_rate(runtime, memory.data(), items, repeats);
}

double measure_reading(Runtime &runtime, const ConstArray &memory) {
  check_dtype<std::uint8_t>(memory, "memory", "uint8");
  if (memory.ndim() != 1 || memory.stride(0) != 1 || memory.shape(0) < kReadItem) {
    refuse("memory", "must be contiguous bytes, " + std::to_string(kReadItem) + " or more, not " +
                         shape_of(memory));
  }
  const auto *data = static_cast<const std::uint8_t *>(memory.data());
  if (reinterpret_cast<std::uintptr_t>(data) % 64 != 0) {
    refuse("memory", "its address is no multiple of 64");
  }
  const nb::gil_scoped_release release;
  return read_rate(runtime, data, memory.shape(0) / kReadItem, 1);
}

double measure_dot_peak(Runtime &runtime, const std::string &type, int repeats,
                        std::int64_t rounds) {
  if (rounds < 1) refuse("rounds", "less than 1");
  float (*work)(std::int64_t) = nullptr;
  double products = 24.0 * 16.0 * static_cast<double>(rounds);
  if (type == "f32") {
    work = runtime.kernels.multiply_add_f32;
  } else if (type == "bf16") {
    // Without an instruction for bf16, numbers are widened and multiplied as float32.
    work = runtime.kernels.has_bf16_dot ? runtime.kernels.multiply_add_bf16
                                        : runtime.kernels.multiply_add_f32;
    if (runtime.kernels.has_bf16_dot) products *= 2;
  } else if (type == "int8") {
    work = runtime.kernels.multiply_add_int8;
    products *= 4;
  } else {
    refuse("type", "'" + type + "' is none of f32, bf16, int8");
  }
  const nb::gil_scoped_release release;
  const int threads = runtime.pool.num_threads();
  const double best = shortest(repeats, [&] {
    runtime.pool.run([&](Worker &worker) {
      worker.share(threads, [&](std::int64_t) {
        volatile float kept = work(rounds);
        (void)kept;
      });
    });
  });
  return 2.0 * products * threads / best;
}

}  // namespace

void bind_runtime(nb::module_ &m) {
  nb::class_<IsaLevel>(m, "IsaLevel", "A set of kernels. `usable`: it may run in this process.")
      .def_ro("name", &IsaLevel::name)
      .def_ro("missing", &IsaLevel::missing)
      .def_prop_ro("built", [](const IsaLevel &level) { return level.kernels != nullptr; })
      .def_prop_ro("usable", &IsaLevel::usable);
  m.def("isa_levels", &isa_levels, "All levels, from the plainest to the fastest.");
  m.def("pin_this_thread", &pin_this_thread, nb::arg("cpu"), "Pins the calling thread to a core.");
  m.def("allocate", &allocate, nb::arg("num_bytes"),
        "Zeroed bytes, in huge pages where the system allows: a numpy array [num_bytes] uint8.");

  nb::class_<Ticket>(m, "Ticket", "The handle of submitted work.")
      .def("done", &Ticket::done)
      .def("wait", &Ticket::wait, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<CoreWaker>(m, "CoreWaker", "Keeps cores from halting: `with waker:` around a wait.")
      .def(nb::init<const std::vector<int> &, int>(), nb::arg("cpus"), nb::arg("most_us"),
           "Threads of the idle policy, one on each core. most_us: of a wait, through which they\n"
           "spin. Raises ValueError for a core, RuntimeError where the system refuses them.")
      .def(
          "__enter__",
          [](CoreWaker &waker) -> CoreWaker & {
            waker.begin();
            return waker;
          },
          nb::rv_policy::reference)
      .def("__exit__", [](CoreWaker &waker, const nb::args &) { waker.end(); });

  nb::class_<HeldRowPool>(m, "RowPool", "Memory of tensors that live for moments (row_pool.h).")
      .def(nb::init<>())
      .def("take", &take_rows, nb::arg("num_bytes"),
           "Bytes with whatever stands there, [num_bytes] uint8, aligned to pages; the pool's "
           "again\n"
           "when the last tensor on them is gone.")
      .def_prop_ro("num_free", [](const HeldRowPool &held) { return held.pool->num_free(); });

  nb::class_<Runtime>(m, "Runtime", "Compute threads and the kernels that they run.")
      .def(
          "__init__",
          [](Runtime *self, const std::string &isa, int num_threads, std::vector<int> cpus,
             int spin_us) {
            new (self) Runtime(find_kernels(isa), num_threads, std::move(cpus), spin_us);
          },
          nb::arg("isa"), nb::arg("num_threads"), nb::arg("cpus") = std::vector<int>{},
          nb::arg("spin_us") = 100,
          "isa: the name of a level. cpus: a core for every thread, or none. Raises ValueError.")
      .def_prop_ro("isa", [](const Runtime &runtime) { return runtime.kernels.name; })
      .def_prop_ro("num_threads", [](const Runtime &runtime) { return runtime.pool.num_threads(); })
      .def(
          "take_part_times",
          [](Runtime &runtime) {
            const auto seconds = runtime.parts.take();
            std::map<std::string, double> by_name;
            for (std::size_t i = 0; i < seconds.size(); ++i) by_name[kPartNames[i]] = seconds[i];
            return by_name;
          },
          "Seconds by part of a decoder layer, since they were last taken.")
      .def("measure_read_bandwidth", &measure_read_bandwidth, nb::arg("num_bytes"),
           nb::arg("repeats") = 3,
           "Bytes per second that the threads read together, of so many that are allocated for it.")
      .def("measure_reading", &measure_reading, nb::arg("memory"),
           "Bytes per second that the threads read together, of [N] bytes, once.")
      .def("measure_dot_peak", &measure_dot_peak, nb::arg("type"), nb::arg("repeats") = 3,
           nb::arg("rounds") = 400000,
           "Operations per second (a multiply-add is two) on f32, bf16 or int8 in registers: the\n"
           "best of `repeats` times `rounds` times 24 vectors for each thread.");
}

}  // namespace moeserve
