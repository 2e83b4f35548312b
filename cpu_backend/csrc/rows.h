// Scratch memory for rows on their way through products.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace moeserve {

// Memory that only grows, for one kind of scratch; its contents are lost when it does.
class Scratch {
 public:
  template <class T>
  T *take(std::size_t count) {
    const std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      data_.reset();
      void *memory = std::aligned_alloc(64, bytes);
      if (memory == nullptr) throw std::bad_alloc();
      data_.reset(memory);
      size_ = bytes;
    }
    return static_cast<T *>(data_.get());
  }

 private:
  struct Free {
    void operator()(void *memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> data_;
  std::size_t size_ = 0;
};

// The form in which these kernels take rows for that layout.
inline RowFormat row_format(const Kernels &kernels, const PackedLayout &layout) {
  RowFormat format = {};
  format.form = kernels.row_form(layout);
  format.cols = layout.cols;
  format.num_groups = layout.num_groups;
  format.group_cols = layout.group_cols;
  // What `sums` are multiplied with: the code that stands for zero; stored ones multiply later.
  switch (layout.format) {
    case Format::kInt8:
      format.zero = 128;
      break;
    case Format::kInt4:
      format.zero = layout.asymmetric ? 1 : 8;
      if (layout.has_factors()) {  // gemm_factors.h
        format.group_cols = kRunInputs;
        format.num_groups = layout.padded_cols / kRunInputs;
        format.row_zero = 128;
      }
      break;
    case Format::kMxfp4:
      format.zero = 12;
      break;
    case Format::kF32:
    case Format::kBF16:
    case Format::kFp8:
      break;
  }
  const std::size_t item = format.form == RowForm::kF32 ? 4 : format.form == RowForm::kBF16 ? 2 : 1;
  format.data_bytes = (static_cast<std::size_t>(layout.padded_cols) * item + 63) / 64 * 64;
  // Rows whole pages apart would share the few places that a first-level cache has for them.
  if (format.data_bytes % 4096 == 0) format.data_bytes += 64;
  return format;
}

// Room for `count` prepared rows.
class RowBuffer {
 public:
  Rows take(const RowFormat &format, std::int64_t count) {
    const auto rows = static_cast<std::size_t>(count);
    const auto sums = static_cast<std::size_t>(format.num_sums());
    return {data_.take<std::uint8_t>(rows * format.data_bytes),
            sums_.take<std::int32_t>(rows * sums), scales_.take<float>(rows)};
  }

 private:
  Scratch data_, sums_, scales_;
};

inline Rows rows_from(const Rows &rows, const RowFormat &format, std::int64_t first) {
  const auto at = static_cast<std::size_t>(first);
  return {rows.data + at * format.data_bytes,
          rows.sums + at * static_cast<std::size_t>(format.num_sums()), rows.scales + at};
}

}  // namespace moeserve
