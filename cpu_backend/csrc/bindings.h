// What the parts of the Python module share. Arrays come in as nanobind ndarrays on the CPU (numpy
// arrays, torch tensors); every function checks types and shapes and says which argument is wrong.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace moeserve {

void bind_runtime(nanobind::module_ &m);
void bind_packing(nanobind::module_ &m);
void bind_products(nanobind::module_ &m);
void bind_attention(nanobind::module_ &m);
void bind_decoder(nanobind::module_ &m);
void bind_predictor(nanobind::module_ &m);
void bind_markov(nanobind::module_ &m);
void bind_huge_pages(nanobind::module_ &m);

using Array = nanobind::ndarray<nanobind::device::cpu>;
using ConstArray = nanobind::ndarray<nanobind::ro, nanobind::device::cpu>;

[[noreturn]] inline void refuse(const char *name, const std::string &problem) {
  throw std::invalid_argument(std::string(name) + ": " + problem);
}

// place: of a layer among the MoE layers.
inline void check_place(int place, int num_layers) {
  if (place < 0 || place >= num_layers) {
    refuse("place", std::to_string(place) + " is not within 0.." + std::to_string(num_layers - 1));
  }
}

template <class A>
std::string shape_of(const A &array) {
  std::string text = "[";
  for (std::size_t i = 0; i < array.ndim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(array.shape(i));
  }
  return text + "]";
}

// Reading numbers that straddle their own size is undefined in C++, whatever the CPU makes of it.
template <class A>
void check_aligned(const A &array, const char *name, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(array.data()) % bytes != 0) {
    refuse(name, "its address is no multiple of " + std::to_string(bytes) + "; copy it");
  }
}

// float32, bfloat16 or float16. Throws std::invalid_argument, with the argument's name, for others.
template <class A>
Dtype float_dtype(const A &array, const char *name) {
  const nanobind::dlpack::dtype type = array.dtype();
  check_aligned(array, name, type.bits == 32 ? 4 : 2);
  const auto code = static_cast<nanobind::dlpack::dtype_code>(type.code);
  if (code == nanobind::dlpack::dtype_code::Float && type.bits == 32) return Dtype::kF32;
  if (code == nanobind::dlpack::dtype_code::Float && type.bits == 16) return Dtype::kF16;
  if (code == nanobind::dlpack::dtype_code::Bfloat && type.bits == 16) return Dtype::kBF16;
  refuse(name, "must be float32, bfloat16 or float16");
}

template <class T, class A>
void check_dtype(const A &array, const char *name, const char *wanted) {
  if (array.dtype() != nanobind::dtype<T>()) refuse(name, std::string("must be ") + wanted);
  check_aligned(array, name, sizeof(T));
}

// A two-dimensional array whose rows are contiguous; they may stand apart.
template <class A>
void check_rows(const A &array, const char *name, std::int64_t rows, std::int64_t cols) {
  const bool fits = array.ndim() == 2 &&
                    (rows < 0 || static_cast<std::int64_t>(array.shape(0)) == rows) &&
                    static_cast<std::int64_t>(array.shape(1)) == cols;
  if (!fits) {
    refuse(name, "shape " + shape_of(array) + ", expected [" +
                     (rows < 0 ? std::string("rows") : std::to_string(rows)) + ", " +
                     std::to_string(cols) + "]");
  }
  if (cols > 1 && array.shape(0) > 0 && array.stride(1) != 1) {
    refuse(name, "its rows are not contiguous; call .contiguous()");
  }
  if (array.shape(0) > 1 && array.stride(0) < cols) {
    refuse(name, "its rows overlap; call .contiguous()");
  }
}

template <class A>
void check_contiguous(const A &array, const char *name) {
  std::int64_t step = 1;
  for (std::size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) > 1 && array.stride(i) != step) {
      refuse(name, "is not contiguous; call .contiguous()");
    }
    step *= static_cast<std::int64_t>(array.shape(i));
  }
}

// What each of `rows` rows chose, ids [rows, K]: K.
template <class A>
int check_choices(const A &ids, std::int64_t rows) {
  check_dtype<std::int64_t>(ids, "ids", "int64");
  check_contiguous(ids, "ids");
  const int top_k = ids.ndim() == 2 ? static_cast<int>(ids.shape(1)) : -1;
  check_rows(ids, "ids", rows, top_k);
  return top_k;
}

template <class A>
void check_size(const A &array, const char *name, std::size_t wanted) {
  if (array.ndim() != 1 || array.shape(0) != wanted) {
    refuse(name, "shape " + shape_of(array) + ", expected [" + std::to_string(wanted) + "]");
  }
}

}  // namespace moeserve
