#include "row_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <new>

namespace moeserve {
namespace {

RowPool::Block map_block(std::size_t num_bytes) {
  const std::size_t size = std::bit_ceil(num_bytes);
  void *memory = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return {memory, size};
}

bool is_smaller(const RowPool::Block &one, const RowPool::Block &other) {
  return one.num_bytes < other.num_bytes;
}

}  // namespace

RowPool::~RowPool() {
  for (const Block &block : free_) munmap(block.memory, block.num_bytes);
}

RowPool::Block RowPool::take(std::size_t num_bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);  // blocks stand in the order of their sizes
    const auto enough =
        std::lower_bound(free_.begin(), free_.end(), Block{nullptr, num_bytes}, is_smaller);
    if (enough != free_.end()) {
      const Block found = *enough;
      free_.erase(enough);
      return found;
    }
    if (!free_.empty()) {
      munmap(free_.back().memory, free_.back().num_bytes);
      free_.pop_back();
    }
  }
  return map_block(num_bytes);
}

void RowPool::give_back(Block block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.insert(std::lower_bound(free_.begin(), free_.end(), block, is_smaller), block);
}

std::size_t RowPool::num_free() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return free_.size();
}

}  // namespace moeserve
