// What calls of attention get from Python, and its checks.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "bindings.h"
#include "tensor.h"

namespace moeserve {

constexpr std::int64_t kMostNumbers = std::int64_t{1} << 24;  // of a row: int in the kernels

inline std::int64_t size(const Tensor &x, std::size_t dim) {
  return static_cast<std::int64_t>(x.shape(dim));
}

inline void check_shape(const Tensor &x, const char *name, const std::vector<std::int64_t> &shape) {
  bool fits = x.ndim() == shape.size();
  for (std::size_t i = 0; fits && i < shape.size(); ++i) fits = size(x, i) == shape[i];
  if (fits) return;
  std::string wanted = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    wanted += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  }
  refuse(name, "shape " + shape_of(x) + ", expected " + wanted + "]");
}

inline void check_dims(const Tensor &x, const char *name, std::size_t dims) {
  if (x.ndim() != dims) {
    refuse(name, "shape " + shape_of(x) + ", expected " + std::to_string(dims) + " dimensions");
  }
  for (std::size_t i = 1; i < dims; ++i) {
    if (size(x, i) < 1 || size(x, i) > kMostNumbers) {
      refuse(name,
             "shape " + shape_of(x) + ": sizes must be within 1.." + std::to_string(kMostNumbers));
    }
  }
}

inline void check_last_contiguous(const Tensor &x, const char *name) {
  if (x.shape(x.ndim() - 1) > 1 && x.stride(x.ndim() - 1) != 1) {
    refuse(name, "its last dimension is not contiguous; call .contiguous()");
  }
}

inline Dtype check_dtype_as(const Tensor &x, const char *name, Dtype wanted, const char *other) {
  const Dtype dtype = float_dtype(x, name);
  if (dtype != wanted) refuse(name, std::string("must have the dtype of ") + other);
  return dtype;
}

// An array of float32 of that shape.
inline const float *floats(const Tensor &x, const char *name,
                           const std::vector<std::int64_t> &shape) {
  check_dtype<float>(x, name, "float32");
  check_shape(x, name, shape);
  check_contiguous(x, name);
  return static_cast<const float *>(x.data());
}

inline const std::int64_t *slots(const Tensor &x, const char *name, std::int64_t count,
                                 std::int64_t num_slots) {
  check_dtype<std::int64_t>(x, name, "int64");
  check_shape(x, name, {count});
  check_contiguous(x, name);
  const auto *values = static_cast<const std::int64_t *>(x.data());
  for (std::int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= num_slots) {
      refuse(name, "slot " + std::to_string(values[i]) + " is not within 0.." +
                       std::to_string(num_slots - 1));
    }
  }
  return values;
}

// cosine, sine: [T, dim], with as many dimensions of one between as torch's broadcasting wants.
inline RowTurns turns_of(const Tensor &cosine, const Tensor &sine, std::int64_t num_rows,
                         std::int64_t most) {
  RowTurns turns = {};
  for (const auto &[x, name, place] :
       {std::tuple{&cosine, "cosine", &turns.cosine}, std::tuple{&sine, "sine", &turns.sine}}) {
    check_dtype<float>(*x, name, "float32");
    check_contiguous(*x, name);
    bool fits = x->ndim() >= 2 && size(*x, 0) == num_rows;
    for (std::size_t i = 1; i + 1 < x->ndim(); ++i) fits = fits && x->shape(i) == 1;
    const std::int64_t dim = fits ? size(*x, x->ndim() - 1) : 0;
    if (!fits || dim < 2 || dim % 2 != 0 || dim > most) {
      refuse(name, "shape " + shape_of(*x) + ", expected [" + std::to_string(num_rows) +
                       ", an even number up to " + std::to_string(most) + "]");
    }
    *place = static_cast<const float *>(x->data());
    turns.dim = static_cast<int>(dim);
  }
  if (cosine.shape(cosine.ndim() - 1) != sine.shape(sine.ndim() - 1)) {
    refuse("sine", "must have the shape of cosine");
  }
  return turns;
}

// The sequences of one step. Holds the arrays of their slots.
class AttentionSpans {
 public:
  using Item = std::tuple<std::int64_t, std::int64_t, std::int64_t, nanobind::object>;

  explicit AttentionSpans(const std::vector<Item> &items) {
    for (const auto &[first_row, num_rows, context_tokens, kv_slots] : items) {
      if (first_row != num_rows_) {
        refuse("spans", "one starts at row " + std::to_string(first_row) + ", expected " +
                            std::to_string(num_rows_));
      }
      if (num_rows < 1 || num_rows > context_tokens) {
        refuse("spans", std::to_string(num_rows) + " rows with a context of " +
                            std::to_string(context_tokens) + " tokens, which includes them");
      }
      Tensor array;
      if (!array.read(kv_slots)) refuse("spans", "slots are no array on the CPU");
      const auto *values =
          slots(array, "spans", context_tokens, std::numeric_limits<std::int64_t>::max());
      num_slots_ = std::max(num_slots_, *std::max_element(values, values + context_tokens) + 1);
      spans_.push_back({first_row, num_rows, context_tokens, values});
      owners_.push_back(kv_slots);
      num_rows_ += num_rows;
      longest_context_ = std::max(longest_context_, context_tokens);
    }
  }

  std::int64_t num_rows() const { return num_rows_; }
  std::int64_t longest_context() const { return longest_context_; }
  std::int64_t num_slots() const { return num_slots_; }  // that a pool must have at least
  const std::vector<AttentionSpan> &spans() const { return spans_; }

 private:
  std::vector<AttentionSpan> spans_;
  std::vector<nanobind::object> owners_;
  std::int64_t num_rows_ = 0;
  std::int64_t longest_context_ = 0;
  std::int64_t num_slots_ = 0;
};

}  // namespace moeserve
