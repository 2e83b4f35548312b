// What every ISA level offers, as a table of functions. The tables differ in speed and in the last
// bits of float results; which one runs is decided once, by dispatch.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "packed.h"

namespace moeserve {

// Types of activations and of kv. Values are those that Python passes.
enum class Dtype : int { kF32 = 0, kBF16 = 1, kF16 = 2 };
constexpr std::size_t size_of(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

// Inputs of int4 whose products with int8 add up to 16 bits: 32 * 8 * 127.
constexpr int kRunInputs = 32;

// How rows stand ready for products. F32: floats. BF16: for the bf16 dot instruction. Int8: one
// scale per row, and for every group of the weights -zero * (sum of the row's codes in it); behind
// these, where row_zero is not 0, -row_zero * (sum of all of its codes).
enum class RowForm : int { kF32 = 0, kBF16 = 1, kInt8 = 2 };

struct RowFormat {
  RowForm form;
  int cols;        // K
  int num_groups;  // of the weights, for Int8
  int group_cols;
  std::int32_t zero;  // of symmetric codes
  std::int32_t row_zero;
  std::size_t data_bytes;  // of one row, a multiple of 64, padded with zeros

  int num_sums() const { return num_groups + (row_zero == 0 ? 0 : 1); }
};

// A batch of rows in a RowFormat. sums, scales: Int8 only.
struct Rows {
  std::uint8_t *data;
  std::int32_t *sums;  // [rows, num_sums()]
  float *scales;       // [rows]
};

struct GemmJob {
  const std::uint8_t *panels;  // of the first output
  const PackedLayout *layout;
  Rows rows;
  const std::int32_t *row_ids;  // [num_rows] places in `rows`, or null: the first ones, in order
  const RowFormat *row_format;
  int num_rows;
  int num_panels;
  float *out;              // [num_rows, out_stride], 16 floats per panel
  std::size_t out_stride;  // in floats
  // Panels of the same layout that this thread will want next, to be asked for meanwhile; or none.
  const std::uint8_t *next = nullptr;
  int num_next = 0;
  // The rows that this thread will want next, the same; or none.
  const std::uint8_t *next_rows = nullptr;
  std::size_t next_rows_bytes = 0;
};

enum class Activation : int {
  kSilu = 0,
  kGelu = 1,
  kGeluTanh = 2,
  kQuickGelu = 3,
  kRelu = 4,
  kSwigluClamped = 5,
};

struct ActivationSpec {
  Activation kind;
  float alpha;  // kSwigluClamped only
  float limit;
};

struct Kernels {
  const char *name;
  AttentionKernels attention;

  // out = rows x panels, overwriting. A row's result depends on that row and the weights alone, not
  // on num_rows, num_panels or where the row stands.
  void (*gemm)(const GemmJob &job);
  // The form in which gemm wants rows for that layout.
  RowForm (*row_form)(const PackedLayout &layout);
  // Panels that gemm multiplies together where rows are many: whole multiples of it are best.
  int (*tile_panels)(const PackedLayout &layout);

  // One row of x (K numbers) into place `row` of `rows`.
  void (*prepare_row)(const RowFormat &format, Dtype dtype, const void *x, const Rows &rows,
                      std::int64_t row);
  void (*to_float)(Dtype dtype, const void *x, float *out, std::int64_t count);
  void (*from_float)(Dtype dtype, const float *x, void *out, std::int64_t count);

  // gate_up: panels of gate and up in turn, 16 numbers each, as gemm leaves them: [2 * count].
  // bias: as gate_up, or null. out[i] = activation(gate[i]) * up[i], for `count` (times 16)
  // numbers.
  void (*gated)(const ActivationSpec &spec, const float *gate_up, const float *bias, float *out,
                int num_pairs);
  // y += factor * (x + bias); bias may be null.
  void (*accumulate)(float *y, const float *x, const float *bias, float factor, int count);
  // out = x * rsqrt(mean(x^2) + eps) * weight. In and out in dtype.
  void (*rms_norm)(Dtype dtype, const void *x, const float *weight, float eps, void *out,
                   int count);

  // x += y, in dtype.
  void (*add)(Dtype dtype, void *x, const void *y, int count);
  // In place: e^x over their sum; 1 / (1 + e^-x).
  void (*softmax)(float *x, int count);
  void (*sigmoid)(float *x, int count);

  // For measuring the machine: see row_kernels.h.
  float (*read_all)(const std::uint8_t *data, std::size_t num_bytes);
  float (*multiply_add_f32)(std::int64_t rounds);
  float (*multiply_add_bf16)(std::int64_t rounds);
  float (*multiply_add_int8)(std::int64_t rounds);
  bool has_bf16_dot;
};

// Null where this build has no such level.
const Kernels *scalar_kernels();
const Kernels *scalar_bf16_kernels();  // for tests
const Kernels *avx2_kernels();
const Kernels *avx512_kernels();
const Kernels *avx512_vnni_kernels();
const Kernels *avx512_bf16_kernels();
const Kernels *amx_kernels();

}  // namespace moeserve
