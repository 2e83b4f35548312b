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
    runtime.pool.run([&](Worker &worker) { worker.share_rows(num_rows, row); });
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

ExpertChoice choose(Runtime &runtime, const FfnPart &part, const ExpertJob &job,
                    ChoiceMemory &memory) {
  const int top_k = part.gate == nullptr ? 1 : part.rule.top_k;
  const auto choices = static_cast<std::size_t>(job.num_tokens * top_k);
  auto *ids = memory.ids.take<std::int64_t>(choices);
  auto *weights = memory.weights.take<float>(choices);
  if (part.gate == nullptr) {
    std::fill_n(ids, choices, 0);
    std::fill_n(weights, choices, 1.0f);
  } else {
    route(runtime, *part.gate, part.rule, job.dtype, job.x, job.num_tokens, job.x_stride, ids,
          weights);
  }
  return {part.experts, ids, weights, top_k, nullptr};
}

// Of the first list.
void count_uses(std::int32_t *uses, int num_experts, const ExpertJob &job) {
  std::fill_n(uses, num_experts, 0);
  const ExpertChoice &choice = job.lists[0];
  for (std::int64_t i = 0; i < job.num_tokens * choice.top_k; ++i) ++uses[choice.ids[i]];
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

void run_head(Runtime &runtime, const Norm &norm, const Matrix &head, Dtype dtype, const void *x,
              std::int64_t x_bytes, std::int64_t num_rows, float *logits) {
  const std::lock_guard<std::mutex> lock(runtime.half_mutex);
  const int cols = head.layout.cols;
  const auto bytes = static_cast<std::int64_t>(size_of(dtype)) * cols;
  void *normed =
      runtime.workspace.normed.take<std::uint8_t>(static_cast<std::size_t>(num_rows * bytes));
  rms_norm(runtime, dtype, norm, x, x_bytes, normed, bytes, num_rows, cols);
  linear(runtime, head, dtype, normed, num_rows, cols, Dtype::kF32, logits, head.layout.rows);
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

void run_ffn(Runtime &runtime, const FfnHalf &half, const Stream &stream, std::int32_t *uses) {
  const std::lock_guard<std::mutex> lock(runtime.half_mutex);
  Workspace &workspace = runtime.workspace;
  void *normed = take_rows(workspace.normed, stream, stream.hidden);
  void *sums = take_rows(workspace.mixed, stream, stream.hidden);
  Laps laps(runtime.parts);
  norm_stream(runtime, half.norm, stream, normed);
  laps.end(Part::kNorm);
  ExpertJob job = {};
  job.dtype = job.y_dtype = stream.dtype;
  job.x = normed;
  job.num_tokens = stream.num_rows;
  job.x_stride = stream.hidden;
  job.num_lists = half.num_parts;
  job.y = sums;
  for (int i = 0; i < half.num_parts; ++i) {
    job.lists[i] = choose(runtime, half.parts[i], job, workspace.choices[i]);
  }
  if (uses != nullptr) count_uses(uses, half.parts[0].rule.num_experts, job);
  laps.end(Part::kRouter);
  run_experts(runtime, job);
  laps.skip();
  add_to_stream(runtime, stream, sums);
  laps.end(Part::kNorm);
}

}  // namespace moeserve
