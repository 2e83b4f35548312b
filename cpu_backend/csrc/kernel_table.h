// The table of one ISA level, from the templates that were included before this file.
#pragma once

#if !defined(MOESERVE_ATTENTION_ELSEWHERE)
#include "attention_kernels.h"
#endif
#include "gemm_kernels.h"
#include "row_kernels.h"

namespace {

constexpr moeserve::Kernels make_table(const char *name) {
  moeserve::Kernels table = {};
  table.name = name;
  table.gemm = gemm;
  table.row_form = row_form;
  table.tile_panels = tile_panels;
  table.prepare_row = prepare_row;
  table.to_float = to_float;
  table.from_float = from_float;
  table.gated = gated;
  table.accumulate = accumulate;
  table.rms_norm = rms_norm;
  table.add = add;
  table.softmax = softmax;
  table.sigmoid = sigmoid_row;
  table.read_all = read_all;
  table.multiply_add_f32 = multiply_add_f32;
  table.multiply_add_bf16 = multiply_add_bf16;
  table.multiply_add_int8 = multiply_add_int8;
  table.has_bf16_dot = Vec::kHasBf16Dot;
#if !defined(MOESERVE_ATTENTION_ELSEWHERE)
  table.attention = make_attention_table();
#endif
  return table;
}

}  // namespace
