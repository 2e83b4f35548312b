// What every call from Python needs: the kernels of one ISA level, the threads to run them, and
// scratch memory that is kept between calls (fresh memory costs a page fault for every 4 KiB).
#pragma once

#include <mutex>
#include <utility>
#include <vector>

#include "kernels.h"
#include "part_times.h"
#include "rows.h"
#include "thread_pool.h"

namespace moeserve {

// Lists of experts that one call may compute (moe.h).
constexpr int kMaxExpertLists = 2;

struct ExpertMemory {
  RowBuffer hidden;  // between an expert's two products
  Scratch activated;
};

struct ChoiceMemory {
  Scratch ids, weights;
};

struct Workspace {
  RowBuffer input;        // prepared rows of x
  RowBuffer other_input;  // in the form of a second list
  ExpertMemory experts[kMaxExpertLists];
  Scratch sums;
  Scratch logits;                         // under router_mutex
  Scratch normed, projected, mixed;       // of half a decoder layer, under half_mutex
  ChoiceMemory choices[kMaxExpertLists];  // the same
  std::vector<Scratch> per_thread;
};

struct Runtime {
  Runtime(const Kernels &kernels, int num_threads, std::vector<int> cpus, int spin_us)
      : kernels(kernels), pool(num_threads, std::move(cpus), spin_us) {
    workspace.per_thread.resize(static_cast<std::size_t>(num_threads));
  }

  const Kernels &kernels;
  std::mutex mutex;  // held by whoever uses the workspace
  // Of calls that are made of others: taken before `mutex`, the last named first.
  std::mutex router_mutex, half_mutex;
  Workspace workspace;
  PartTimes parts;
  ThreadPool pool;  // last, so that it goes first: until then, submitted work uses the others
};

}  // namespace moeserve
