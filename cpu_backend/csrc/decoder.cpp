#include "decoder.h"

#include <algorithm>

namespace moeserve {
namespace {

constexpr std::int64_t kWorthSharing = 1 << 16;  // numbers; below, waking threads costs more

template <class Row>
void for_rows(Runtime &runtime, std::int64_t num_rows, int cols, const Row &row) {
  if (num_rows * cols < kWorthSharing) {
    for (std::int64_t i = 0; i < num_rows; ++i) row(i);
  } else {
    runtime.pool.run([&](Worker &worker) { worker.share(num_rows, row); });
  }
}

std::size_t row_bytes(const Stream &stream) {
  return static_cast<std::size_t>(stream.hidden) * size_of(stream.dtype);
}

void *take_rows(Scratch &scratch, const Stream &stream, std::int64_t cols) {
  return scratch.take<std::uint8_t>(static_cast<std::size_t>(stream.num_rows * cols) *
                                    size_of(stream.dtype));
}

void norm_stream(Runtime &runtime, const Norm &norm, const Stream &stream, void *out) {
  const auto bytes = static_cast<std::int64_t>(row_bytes(stream));
  rms_norm(runtime, stream.dtype, norm, stream.x, bytes, out, bytes, stream.num_rows,
           stream.hidden);
}

void add_to_stream(Runtime &runtime, const Stream &stream, const void *y) {
  const std::size_t bytes = row_bytes(stream);
  for_rows(runtime, stream.num_rows, stream.hidden, [&](std::int64_t row) {
    const std::size_t at = static_cast<std::size_t>(row) * bytes;
    runtime.kernels.add(stream.dtype, static_cast<std::uint8_t *>(stream.x) + at,
                        static_cast<const std::uint8_t *>(y) + at, stream.hidden);
  });
}

void count_uses(std::int32_t *uses, int num_experts, const std::int64_t *ids, std::size_t choices) {
  std::fill_n(uses, num_experts, 0);
  for (std::size_t i = 0; i < choices; ++i) ++uses[ids[i]];
}

}  // namespace

void rms_norm(Runtime &runtime, Dtype dtype, const Norm &norm, const void *x, std::int64_t x_bytes,
              void *out, std::int64_t out_bytes, std::int64_t num_rows, int cols) {
  const auto *from = static_cast<const std::uint8_t *>(x);
  auto *to = static_cast<std::uint8_t *>(out);
  for_rows(runtime, num_rows, cols, [&](std::int64_t row) {
    runtime.kernels.rms_norm(dtype, from + row * x_bytes, norm.weight, norm.eps,
                             to + row * out_bytes, cols);
  });
}

void run_attention(Runtime &runtime, const AttentionHalf &half, const Stream &stream,
                   GroupedHeads heads, AttentionCall call,
                   const std::vector<AttentionSpan> &spans) {
  const std::lock_guard<std::mutex> lock(runtime.half_mutex);
  Workspace &workspace = runtime.workspace;
  const Dtype dtype = stream.dtype;
  const std::int64_t rows = stream.num_rows;
  const int qkv_cols = half.qkv->layout.rows, mixed_cols = half.output->layout.cols;
  void *normed = take_rows(workspace.normed, stream, stream.hidden);
  void *qkv = take_rows(workspace.projected, stream, qkv_cols);
  void *mixed = take_rows(workspace.mixed, stream, mixed_cols);
  Laps laps(runtime.parts);
  norm_stream(runtime, half.norm, stream, normed);
  laps.end(Part::kNorm);
  linear(runtime, *half.qkv, dtype, normed, rows, stream.hidden, dtype, qkv, qkv_cols);
  laps.end(Part::kProjection);
  heads.rows = qkv;
  heads.row_stride = qkv_cols;
  prepare(runtime, heads, rows);
  laps.end(Part::kHeads);
  call.queries = qkv;
  call.query_strides[0] = qkv_cols;
  call.query_strides[1] = std::int64_t{heads.group_heads + 2} * heads.head_dim;
  call.query_strides[2] = heads.head_dim;
  call.out = mixed;
  attend(runtime, call, spans);
  laps.end(Part::kAttention);
  linear(runtime, *half.output, dtype, mixed, rows, mixed_cols, dtype, normed, stream.hidden);
  laps.end(Part::kProjection);
  add_to_stream(runtime, stream, normed);
  laps.end(Part::kNorm);
}

void run_expert_half(Runtime &runtime, const ExpertHalf &half, const Stream &stream,
                     std::int32_t *uses) {
  const std::lock_guard<std::mutex> lock(runtime.half_mutex);
  Workspace &workspace = runtime.workspace;
  void *normed = take_rows(workspace.normed, stream, stream.hidden);
  void *sums = take_rows(workspace.mixed, stream, stream.hidden);
  const auto choices =
      static_cast<std::size_t>(stream.num_rows) * static_cast<std::size_t>(half.rule.top_k);
  auto *ids = workspace.ids.take<std::int64_t>(choices);
  auto *weights = workspace.weights.take<float>(choices);
  Laps laps(runtime.parts);
  norm_stream(runtime, half.norm, stream, normed);
  laps.end(Part::kNorm);
  route(runtime, *half.gate, half.rule, stream.dtype, normed, stream.num_rows, stream.hidden, ids,
        weights);
  if (uses != nullptr) count_uses(uses, half.rule.num_experts, ids, choices);
  laps.end(Part::kRouter);
  ExpertJob job = {};
  job.dtype = job.y_dtype = stream.dtype;
  job.x = normed;
  job.num_tokens = stream.num_rows;
  job.x_stride = stream.hidden;
  job.ids = ids;
  job.weights = weights;
  job.top_k = half.rule.top_k;
  job.y = sums;
  run_experts(runtime, *half.experts, job);
  laps.skip();
  add_to_stream(runtime, stream, sums);
  laps.end(Part::kNorm);
}

}  // namespace moeserve
