// The experts of one job computed part by part, as they become readable.
//
// Every choice of a token has a row of its own, whoever computes it; the rows are added up at the
// end, by the experts' numbers (pair_sum.h). So the bits are those of the whole job in one call,
// whatever the parts and their order.
#pragma once

#include <sys/mman.h>

#include <bit>
#include <cstdint>
#include <new>
#include <vector>

#include "moe.h"

namespace moeserve {

// Memory that one job after the other uses; its contents are lost when it grows. Rows of all
// choices of a step are megabytes, and never twice as many: what malloc is given back of such sizes
// it keeps, in pieces that fit the next ones badly. Only pages that are written count, so there is
// room for the next power of two; they are huge ones where the system allows.
class MappedScratch {
 public:
  MappedScratch() = default;
  MappedScratch(const MappedScratch &) = delete;
  MappedScratch &operator=(const MappedScratch &) = delete;
  ~MappedScratch() { release(); }

  void *take(std::size_t bytes) {
    if (bytes > size_) {
      release();  // before there is more: nothing of it is kept
      const std::size_t wanted = std::bit_ceil(bytes);
      void *memory = mmap(nullptr, wanted, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      memory_ = memory;
      size_ = wanted;
      // A hint. Choices of one expert lie all over it, a page of 4 KiB holds one or two.
      madvise(memory, wanted, MADV_HUGEPAGE);
    }
    return memory_;
  }

 private:
  void release() {
    if (size_ > 0) munmap(memory_, size_);
    size_ = 0;
    memory_ = nullptr;
  }
  void *memory_ = nullptr;
  std::size_t size_ = 0;
};

// Rows of a job and what they choose.
struct PartsJob {
  Dtype dtype;
  const void *x;  // [num_tokens, hidden], rows x_stride numbers apart
  std::int64_t num_tokens;
  std::int64_t x_stride;
  std::int64_t hidden;
  const std::int64_t *ids;  // [num_tokens, top_k]
  int top_k;

  std::int64_t num_pairs() const { return num_tokens * top_k; }
};

class ExpertParts {
 public:
  // Another job, to which what was computed so far does not belong. x and ids stay where they are
  // until its `total`.
  void begin(const PartsJob &job);
  const PartsJob &job() const { return job_; }

  // The choices of these experts, which no part had before; how many there are.
  std::int64_t select(const std::vector<int> &experts);
  const std::vector<std::int64_t> &selected() const { return chosen_; }
  // Computes what was selected. The experts must have records.
  void add(Runtime &runtime, const Experts &experts);
  // What was computed elsewhere: results [count, hidden] of choices numbered t * top_k + k.
  void put(const std::int64_t *pairs, std::int64_t count, const float *results);
  // y [num_tokens, hidden] = the weighted sums; a choice of no part adds nothing.
  void total(Runtime &runtime, const float *weights, Dtype y_dtype, void *y);

  float *rows() { return pairs_; }  // [num_pairs, hidden]

 private:
  float *row(std::int64_t pair) { return pairs_ + pair * job_.hidden; }

  PartsJob job_ = {};
  float *pairs_ = nullptr;
  MappedScratch pair_memory_;
  RowBuffer input_;  // rows of x as these experts are multiplied by these kernels; null: not there
  const Experts *prepared_for_ = nullptr;
  const Kernels *prepared_by_ = nullptr;
  std::vector<std::uint8_t> is_there_;  // [num_pairs]
  std::size_t num_ids_ = 0;             // beyond the highest that was chosen
  std::vector<std::uint8_t> wanted_;    // by expert, of num_ids_
  std::vector<std::int64_t> chosen_;    // pairs that are to be computed
};

}  // namespace moeserve
