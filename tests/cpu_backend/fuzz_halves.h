// Halves of decoder layers for the fuzz driver, compared bit for bit with calls of their parts,
// which have oracles of their own.
#pragma once

#include "decoder.h"
#include "fuzz_router.h"

namespace fuzz {

inline void check_same(const Block<std::uint8_t> &a, const Block<std::uint8_t> &b,
                       const std::string &what) {
  if (std::memcmp(a.data(), b.data(), a.size()) != 0) fail(what + " differs from separate calls");
}

inline Block<std::uint8_t> copy_of(const Block<std::uint8_t> &source) {
  Block<std::uint8_t> copy(source.size());
  std::memcpy(copy.data(), source.data(), source.size());
  return copy;
}

// Numbers of a type, one after the other.
inline Block<std::uint8_t> random_stream(Runtime &runtime, Dtype dtype, int count) {
  const Block<float> numbers = random_floats(count);
  Block<std::uint8_t> stream(static_cast<std::size_t>(count) * size_of(dtype));
  runtime.kernels.from_float(dtype, numbers.data(), stream.data(), count);
  return stream;
}

inline void add_rows(Runtime &runtime, Dtype dtype, Block<std::uint8_t> &x,
                     const Block<std::uint8_t> &y, int rows, int cols) {
  const std::size_t bytes = static_cast<std::size_t>(cols) * size_of(dtype);
  for (int r = 0; r < rows; ++r) {
    const std::size_t at = static_cast<std::size_t>(r) * bytes;
    runtime.kernels.add(dtype, x.data() + at, y.data() + at, cols);
  }
}

// Experts of one list with a gate, which every row's choice depends on, or without one.
struct RandomPart {
  RandomPart(Runtime &runtime, int num_experts, int hidden, bool gated)
      : gate(runtime, num_experts, hidden), correction(random_floats(num_experts)) {
    const int panels = pick(1, 4);
    const int inner = panels * kPanelOutputs - pick(0, kPanelOutputs - 1);
    experts.gate_up = random_layout(2 * panels * kPanelOutputs, hidden);
    experts.down = random_layout(hidden, inner);
    experts.down_offset = experts.gate_up.bytes();
    experts.activation = {static_cast<Activation>(pick(0, 5)), 1.702f, 7.0f};
    for (int e = 0; e < num_experts; ++e) {
      records.emplace_back(experts.down_offset + experts.down.bytes());
      std::uint8_t *record = records.back().data();
      pack_random(runtime, experts.gate_up, record, first_ids(experts.gate_up.rows));
      pack_random(runtime, experts.down, record + experts.down_offset, first_ids(hidden));
    }
    for (const auto &record : records) experts.records.push_back(record.data());
    matrix = gate.matrix();
    part = {&experts, gated ? &matrix : nullptr, random_rule(num_experts, correction.data())};
  }
  RandomPart(const RandomPart &) = delete;

  RandomMatrix gate;
  Block<float> correction;
  Experts experts = {};
  std::vector<Block<std::uint8_t>> records;
  Matrix matrix;
  FfnPart part;
};

// y = what the part gives for rows of x. Returns how many rows chose each expert.
inline std::vector<std::int32_t> run_part(Runtime &runtime, const FfnPart &part, Dtype dtype,
                                          const Block<std::uint8_t> &x, int rows, int hidden,
                                          Block<std::uint8_t> &y) {
  const int top_k = part.gate == nullptr ? 1 : part.rule.top_k;
  const auto choices = static_cast<std::size_t>(rows * top_k);
  Block<std::int64_t> ids(choices);
  Block<float> weights(choices);
  if (part.gate == nullptr) {
    std::fill_n(ids.data(), choices, 0);
    std::fill_n(weights.data(), choices, 1.0f);
  } else {
    route(runtime, *part.gate, part.rule, dtype, x.data(), rows, hidden, ids.data(),
          weights.data());
  }
  ExpertJob job = {};
  job.dtype = job.y_dtype = dtype;
  job.x = x.data();
  job.num_tokens = rows;
  job.x_stride = hidden;
  job.lists[0] = {part.experts, ids.data(), weights.data(), top_k, nullptr};
  job.num_lists = 1;
  job.y = y.data();
  run_experts(runtime, job);
  std::vector<std::int32_t> counts(part.experts->records.size());
  for (std::size_t i = 0; i < choices; ++i) ++counts[static_cast<std::size_t>(ids[i])];
  return counts;
}

// Routed experts, a dense FFN, or routed experts beside a shared one that is gated or not.
inline void fuzz_ffn_half(Runtime &runtime) {
  const int hidden = chance(0.1) ? pick(257, 400) : pick(1, 90), rows = pick(1, 40);
  const bool dense = chance(0.2), shared = !dense && chance(0.6);
  const RandomPart first(runtime, dense ? 1 : pick(1, 9), hidden, !dense);
  const RandomPart second(runtime, 1, hidden, chance(0.5));
  context += ", FFN half, " +
             std::string(dense    ? "dense"
                         : shared ? "shared"
                                  : "routed") +
             ", H " + std::to_string(hidden) + ", " + std::to_string(rows) + " rows";
  const Block<float> weight = random_floats(hidden);
  const auto dtype = static_cast<Dtype>(pick(0, 2));
  Block<std::uint8_t> x = random_stream(runtime, dtype, rows * hidden);
  Block<std::uint8_t> apart = copy_of(x);
  const Norm norm = {weight.data(), 1e-5f};
  Block<std::int32_t> uses(first.experts.records.size());
  const bool counted = !dense && chance(0.5);
  run_ffn(runtime, {norm, {first.part, second.part}, shared ? 2 : 1},
          {dtype, x.data(), rows, hidden}, counted ? uses.data() : nullptr);

  const auto bytes = static_cast<std::int64_t>(hidden) * static_cast<std::int64_t>(size_of(dtype));
  Block<std::uint8_t> normed(apart.size()), sums(apart.size()), others(apart.size());
  rms_norm(runtime, dtype, norm, apart.data(), bytes, normed.data(), bytes, rows, hidden);
  const auto counts = run_part(runtime, first.part, dtype, normed, rows, hidden, sums);
  if (shared) {
    run_part(runtime, second.part, dtype, normed, rows, hidden, others);
    add_rows(runtime, dtype, sums, others, rows, hidden);
  }
  add_rows(runtime, dtype, apart, sums, rows, hidden);
  check_same(x, apart, "the stream");
  for (std::size_t e = 0; counted && e < counts.size(); ++e) {
    if (counts[e] != uses[e]) fail("uses were counted wrongly");
  }
}

// Sequences in one batch, each with slots of its own in a pool.
struct RandomSpans {
  explicit RandomSpans(int num_slots) {
    std::vector<std::int64_t> free = first_ids(num_slots);
    std::shuffle(free.begin(), free.end(), random_bits);
    std::vector<int> sizes;
    for (int left = num_slots; left > 0 && sizes.size() < 3;) {
      sizes.push_back(pick(1, left));
      left -= sizes.back();
    }
    for (const int context_tokens : sizes) {
      slots.emplace_back(static_cast<std::size_t>(context_tokens));
      for (int i = 0; i < context_tokens; ++i) {
        slots.back()[static_cast<std::size_t>(i)] = free.back();
        free.pop_back();
      }
      const int rows = chance(0.5) ? 1 : pick(1, context_tokens);
      spans.push_back({num_rows, rows, context_tokens, slots.back().data()});
      for (int r = context_tokens - rows; r < context_tokens; ++r) {
        written.push_back(slots.back()[static_cast<std::size_t>(r)]);
      }
      num_rows += rows;
    }
  }
  std::vector<Block<std::int64_t>> slots;
  std::vector<AttentionSpan> spans;
  std::vector<std::int64_t> written;  // slot of every row
  std::int64_t num_rows = 0;
};

inline void fuzz_attention_half(Runtime &runtime) {
  const int kv_heads = pick(1, 3), group = pick(1, 4), dim = 2 * pick(1, 24), hidden = pick(1, 90);
  const int num_slots = chance(0.2) ? pick(200, 400) : pick(1, 80);
  const RandomSpans sequences(num_slots);
  const int rows = static_cast<int>(sequences.num_rows);
  context += ", attention half, " + std::to_string(kv_heads) + " x " + std::to_string(group) +
             " heads of " + std::to_string(dim) + ", " + std::to_string(rows) + " rows";
  const int qkv_cols = kv_heads * (group + 2) * dim, mixed_cols = kv_heads * group * dim;
  const RandomMatrix qkv(runtime, qkv_cols, hidden), output(runtime, hidden, mixed_cols);
  const Matrix qkv_matrix = qkv.matrix(), output_matrix = output.matrix();
  const Block<float> weight = random_floats(hidden), sinks = random_floats(kv_heads * group);
  const Block<float> head_weight = random_floats(kv_heads * (group + 1) * dim);
  const int turned = 2 * pick(1, dim / 2);
  const Block<float> cosine = random_floats(rows * turned), sine = random_floats(rows * turned);
  Block<std::int64_t> written(sequences.written.size());
  std::copy(sequences.written.begin(), sequences.written.end(), written.data());
  const auto dtype = static_cast<Dtype>(pick(0, 2));

  Block<std::uint8_t> entries = random_stream(runtime, dtype, num_slots * kv_heads * 2 * dim);
  Block<std::uint8_t> entries_apart = copy_of(entries);
  Block<std::uint8_t> x = random_stream(runtime, dtype, rows * hidden), apart = copy_of(x);
  GroupedHeads heads = {};
  heads.dtype = dtype;
  heads.num_kv_heads = kv_heads;
  heads.group_heads = group;
  heads.head_dim = dim;
  heads.turns = {cosine.data(), sine.data(), turned};
  heads.norm_weight = chance(0.5) ? head_weight.data() : nullptr;
  heads.norm_stride = chance(0.5) ? 0 : (group + 1) * dim;
  heads.norm_together = chance(0.3);
  heads.norm_eps = 1e-5f;
  heads.clip = chance(0.2) ? 1.5f : INFINITY;
  heads.slots = written.data();
  heads.entries = entries.data();
  AttentionCall call = {};
  call.dtype = dtype;
  call.num_kv_heads = kv_heads;
  call.group_heads = group;
  call.key_dim = call.value_start = call.value_dim = dim;
  call.width = 2 * dim;
  call.window = chance(0.3) ? pick(1, num_slots) : 0;
  call.scale = 0.3f;
  call.sinks = chance(0.3) ? sinks.data() : nullptr;
  call.entries = entries.data();
  const Norm norm = {weight.data(), 1e-5f};
  run_attention(runtime, {norm, &qkv_matrix, &output_matrix}, {dtype, x.data(), rows, hidden},
                heads, call, sequences.spans);

  const std::size_t size = size_of(dtype);
  const auto bytes = static_cast<std::int64_t>(static_cast<std::size_t>(hidden) * size);
  Block<std::uint8_t> normed(apart.size());
  Block<std::uint8_t> projected(static_cast<std::size_t>(rows * qkv_cols) * size);
  Block<std::uint8_t> mixed(static_cast<std::size_t>(rows * mixed_cols) * size);
  rms_norm(runtime, dtype, norm, apart.data(), bytes, normed.data(), bytes, rows, hidden);
  linear(runtime, qkv_matrix, dtype, normed.data(), rows, hidden, dtype, projected.data(),
         qkv_cols);
  heads.rows = projected.data();
  heads.row_stride = qkv_cols;
  heads.entries = entries_apart.data();
  prepare(runtime, heads, rows);
  call.queries = projected.data();
  call.query_strides[0] = qkv_cols;
  call.query_strides[1] = (group + 2) * dim;
  call.query_strides[2] = dim;
  call.entries = entries_apart.data();
  call.out = mixed.data();
  attend(runtime, call, sequences.spans);
  linear(runtime, output_matrix, dtype, mixed.data(), rows, mixed_cols, dtype, normed.data(),
         hidden);
  add_rows(runtime, dtype, apart, normed, rows, hidden);
  check_same(x, apart, "the stream");
  check_same(entries, entries_apart, "the kv");
}

}  // namespace fuzz
