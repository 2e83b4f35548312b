// Memory of tensors that live for moments, taken again by the next ones.
//
// Rows of a prompt are megabytes. Fresh ones from the system come page by page, each at the price
// of a fault when it is first written: in a virtual machine a microsecond for 4 KiB, more than most
// of what is done with them.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

namespace moeserve {

class RowPool {
 public:
  struct Block {
    void *memory;
    std::size_t num_bytes;  // a power of two; pages that nobody has written take no memory
  };

  RowPool() = default;
  RowPool(const RowPool &) = delete;
  RowPool &operator=(const RowPool &) = delete;
  ~RowPool();  // only when all blocks were given back

  // At least so many bytes, aligned to pages, with what their last user left there. Of free blocks
  // the smallest that is large enough; where all are smaller, a new one instead of the largest, so
  // that there are never more blocks than were in use at once. Throws std::bad_alloc.
  Block take(std::size_t num_bytes);
  void give_back(Block block);

  std::size_t num_free() const;

 private:
  mutable std::mutex mutex_;
  std::vector<Block> free_;
};

}  // namespace moeserve
