// y = x W^T + bias for a packed W.
#pragma once

#include <cstdint>

#include "packed.h"
#include "runtime.h"

namespace moeserve {

struct Matrix {
  PackedLayout layout;
  const std::uint8_t *panels;
  const float *bias;  // [num_panels * 16], or null
};

// Whether the calling thread computes that many rows alone: it is done before another has woken.
bool is_alone(const Matrix &matrix, std::int64_t num_rows);

// x: [num_rows, K], rows `x_stride` numbers apart. y: [num_rows, N] of y_dtype, `y_stride` apart.
void linear(Runtime &runtime, const Matrix &matrix, Dtype x_dtype, const void *x,
            std::int64_t num_rows, std::int64_t x_stride, Dtype y_dtype, void *y,
            std::int64_t y_stride);

}  // namespace moeserve
