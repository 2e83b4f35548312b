// Random products, experts, routers, packings and halves of layers under AddressSanitizer and UBSan
// (`make sanitize`), on every ISA level that this machine runs, each compared with a plain
// computation in double, or with calls that have been.
//
//   fuzz_native [seconds] [seed]
//
// Every array is a heap block of exactly its size, and every round has a Runtime of its own, so
// that a read or write one byte past any of them is seen. The round's seed is printed before a
// failure; that seed with 0 seconds repeats the round alone.
#include <atomic>
#include <chrono>

#include "dispatch.h"
#include "expert_parts.h"
#include "fuzz_halves.h"
#include "fuzz_predictor.h"
#include "fuzz_reference.h"
#include "linear.h"
#include "moe.h"

using namespace fuzz;

namespace {

void fuzz_linear(Runtime &runtime) {
  const Kind kind = random_kind();
  const int outputs = chance(0.15) ? pick(257, 800) : pick(1, 150);
  const int cols = usable_cols(kind, pick(1, 300)), rows = pick(1, 70);
  const PackedLayout layout = layout_of(kind, outputs, cols);
  context += ", linear, format " + std::to_string(static_cast<int>(kind.format)) + " [" +
             std::to_string(outputs) + ", " + std::to_string(cols) + "], " + std::to_string(rows) +
             " rows";
  Block<std::uint8_t> panels(layout.bytes());
  pack_random(runtime, layout, panels.data(), first_ids(outputs));
  Block<float> bias(static_cast<std::size_t>(outputs));
  for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = normal();
  const bool has_bias = chance(0.5);
  const Matrix matrix = {layout, panels.data(), has_bias ? bias.data() : nullptr};

  Numbers x = Numbers::random(rows, cols);
  const int spoilt = chance(0.2) ? pick(0, rows - 1) : -1;
  if (spoilt >= 0) x.spoil(spoilt);
  Numbers y(static_cast<Dtype>(pick(0, 2)), rows, outputs);
  linear(runtime, matrix, x.dtype, x.bytes.data(), rows, x.stride, y.dtype, y.bytes.data(),
         y.stride);

  const auto weight = unpack(layout, panels.data(), first_ids(outputs));
  const double eps = 0x1p-24 * (cols + layout.num_groups + 8);
  for (int r = 0; r < rows; ++r) {
    if (r == spoilt) continue;
    const Used used = as_used(runtime.kernels, layout, row_of(x, r));
    for (int n = 0; n < outputs; ++n) {
      const auto at = static_cast<std::size_t>(n);
      const Sum sum = product(weight[at], used.row);
      const double expected = sum.value + (has_bias ? bias[at] : 0.0f);
      if (y.dtype == Dtype::kF16 && std::fabs(expected) > 60000.0) continue;
      const double bound = eps * (sum.magnitude + 1.0) + rounding(y.dtype, expected);
      check(y.get(r, n), expected, bound,
            "row " + std::to_string(r) + ", output " + std::to_string(n));
    }
  }
}

// An expert's record, and its weights and biases in double.
struct Expert {
  explicit Expert(std::size_t bytes) : record(bytes) {}
  Block<std::uint8_t> record;
  std::vector<std::vector<double>> gate, up, down;
  std::vector<double> gate_bias, up_bias, down_bias;
};

std::vector<double> random_bias(std::uint8_t *record, std::size_t offset,
                                const std::vector<std::int64_t> &ids) {
  std::vector<double> bias;
  for (const std::int64_t id : ids) {
    const float x = offset == 0 ? 0.0f : normal();
    if (offset != 0) std::memcpy(record + offset + 4 * static_cast<std::size_t>(id), &x, 4);
    bias.push_back(x);
  }
  return bias;
}

Expert random_expert(Runtime &runtime, const Experts &experts, std::size_t bytes, int inner) {
  Expert expert(bytes);
  std::vector<std::int64_t> gate, up;
  for (int i = 0; i < inner; ++i) {
    gate.push_back(i / kPanelOutputs * 2 * kPanelOutputs + i % kPanelOutputs);
    up.push_back(gate.back() + kPanelOutputs);
  }
  std::uint8_t *record = expert.record.data();
  std::uint8_t *down = record + experts.down_offset;
  pack_random(runtime, experts.gate_up, record, gate);
  pack_random(runtime, experts.gate_up, record, up);
  const auto outputs = first_ids(experts.down.rows);
  pack_random(runtime, experts.down, down, outputs);
  expert.gate = unpack(experts.gate_up, record, gate);
  expert.up = unpack(experts.gate_up, record, up);
  expert.down = unpack(experts.down, down, outputs);
  expert.gate_bias = random_bias(record, experts.gate_up_bias_offset, gate);
  expert.up_bias = random_bias(record, experts.gate_up_bias_offset, up);
  expert.down_bias = random_bias(record, experts.down_bias_offset, outputs);
  return expert;
}

// Adds weight * expert(x) to y [H] and what it may be off by to bound [H].
void add_expert(const Kernels &kernels, const Experts &experts, const Expert &expert,
                const std::vector<double> &x, double weight, std::vector<double> &y,
                std::vector<double> &bound) {
  const Used input = as_used(kernels, experts.gate_up, x);
  std::vector<double> hidden;
  double inexact = 0.0;  // of the hidden state, before it is rounded
  for (std::size_t i = 0; i < expert.gate.size(); ++i) {
    const Sum gate = product(expert.gate[i], input.row), up = product(expert.up[i], input.row);
    const double g = gate.value + expert.gate_bias[i], u = up.value + expert.up_bias[i];
    hidden.push_back(activation(experts.activation, g, u));
    // Slopes of the activations are below 1.2 in the gate, 2 for clamped SwiGLU's alpha.
    inexact = std::max(inexact, 2.0 * (gate.magnitude * (1.0 + std::fabs(u)) +
                                       up.magnitude * (1.0 + std::fabs(g)) + std::fabs(g * u)));
  }
  const double eps = 0x1p-24 * (experts.gate_up.cols + experts.down.cols + 40);
  const Used used = as_used(kernels, experts.down, hidden);
  for (std::size_t n = 0; n < y.size(); ++n) {
    const Sum sum = product(expert.down[n], used.row);
    double weights = 0.0;
    for (const double w : expert.down[n]) weights += std::fabs(w);
    y[n] += weight * (sum.value + expert.down_bias[n]);
    // A few numbers of the hidden state next to a tie end one step away.
    const double off = eps * (sum.magnitude + std::fabs(expert.down_bias[n]) + inexact * weights) +
                       4.0 * used.step * sum.largest;
    bound[n] += std::fabs(weight) * off;
  }
}

// The job's experts some at a time, in any order.
void run_in_parts(Runtime &runtime, const ExpertJob &job, int hidden) {
  const ExpertChoice &choice = job.lists[0];
  std::vector<int> left;
  for (std::size_t e = 0; e < choice.experts->records.size(); ++e) {
    if (choice.wanted == nullptr || choice.wanted[e] != 0) left.push_back(static_cast<int>(e));
  }
  std::shuffle(left.begin(), left.end(), random_bits);
  ExpertParts parts;
  parts.begin({job.dtype, job.x, job.num_tokens, job.x_stride, hidden, choice.ids, choice.top_k});
  while (!left.empty()) {
    const auto stays = static_cast<std::size_t>(pick(0, static_cast<int>(left.size()) - 1));
    parts.select({left.begin() + static_cast<std::ptrdiff_t>(stays), left.end()});
    left.resize(stays);
    parts.add(runtime, *choice.experts);
  }
  parts.total(runtime, choice.weights, job.y_dtype, job.y);
}

void fuzz_experts(Runtime &runtime) {
  const Kind first = random_kind();
  const Kind second = chance(0.3) ? random_kind() : first;
  const int hidden = usable_cols(first, pick(1, 100)),
            inner = usable_cols(second, chance(0.15) ? pick(257, 600) : pick(1, 70));
  const int panels = (inner + kPanelOutputs - 1) / kPanelOutputs;
  const int num_experts = pick(1, 6), top_k = pick(1, 8), tokens = pick(0, 70);
  context += ", experts, formats " + std::to_string(static_cast<int>(first.format)) + " and " +
             std::to_string(static_cast<int>(second.format)) + ", H " + std::to_string(hidden) +
             ", I " + std::to_string(inner) + ", " + std::to_string(tokens) + " tokens, top " +
             std::to_string(top_k) + " of " + std::to_string(num_experts);
  Experts experts = {};
  experts.gate_up = layout_of(first, 2 * panels * kPanelOutputs, hidden);
  experts.down = layout_of(second, hidden, inner);
  experts.down_offset = experts.gate_up.bytes();
  std::size_t bytes = experts.down_offset + experts.down.bytes();
  if (chance(0.5)) {
    experts.gate_up_bias_offset = bytes;
    bytes += static_cast<std::size_t>(experts.gate_up.num_panels) * kPanelOutputs * 4;
    experts.down_bias_offset = bytes;
    bytes += static_cast<std::size_t>(experts.down.num_panels) * kPanelOutputs * 4;
  }
  experts.activation = {static_cast<Activation>(pick(0, 5)), 1.702f, 7.0f};
  std::vector<Expert> all;
  for (int e = 0; e < num_experts; ++e) {
    all.push_back(random_expert(runtime, experts, bytes, inner));
  }
  for (const Expert &expert : all) experts.records.push_back(expert.record.data());

  const auto choices = static_cast<std::size_t>(tokens * top_k);
  Block<std::int64_t> ids(choices);
  Block<float> weights(choices);
  Block<std::uint8_t> wanted(static_cast<std::size_t>(num_experts));
  const int few = pick(1, num_experts);  // the others are chosen by nobody
  for (std::size_t i = 0; i < choices; ++i) {
    ids[i] = pick(0, few - 1);
    weights[i] = std::fabs(normal());
  }
  for (std::size_t e = 0; e < wanted.size(); ++e) wanted[e] = chance(0.7);
  const bool some = chance(0.4);
  Numbers x = Numbers::random(tokens, hidden);
  Numbers y(static_cast<Dtype>(pick(0, 2)), tokens, hidden);
  const int spoilt = tokens > 0 && chance(0.2) ? pick(0, tokens - 1) : -1;
  if (spoilt >= 0) x.spoil(spoilt);
  Block<std::uint8_t> out(static_cast<std::size_t>(tokens * hidden) * size_of(y.dtype));
  ExpertJob job = {};
  job.dtype = x.dtype;
  job.x = x.bytes.data();
  job.num_tokens = tokens;
  job.x_stride = x.stride;
  job.lists[0] = {&experts, ids.data(), weights.data(), top_k, some ? wanted.data() : nullptr};
  job.num_lists = 1;
  job.y_dtype = y.dtype;
  job.y = out.data();
  if (chance(0.4)) {
    run_experts(runtime, job);
  } else if (chance(0.5)) {
    runtime.pool.submit([&] { run_experts(runtime, job); })->wait();
  } else {
    run_in_parts(runtime, job, hidden);
  }

  for (int t = 0; t < tokens; ++t) {
    std::memcpy(y.bytes.data() + static_cast<std::size_t>(t * y.stride) * size_of(y.dtype),
                out.data() + static_cast<std::size_t>(t * hidden) * size_of(y.dtype),
                static_cast<std::size_t>(hidden) * size_of(y.dtype));
    if (t == spoilt) continue;
    std::vector<double> expected(static_cast<std::size_t>(hidden)), bound = expected;
    const std::vector<double> row = row_of(x, t);
    for (int k = 0; k < top_k; ++k) {
      const auto choice = static_cast<std::size_t>(t * top_k + k);
      const auto expert = static_cast<std::size_t>(ids[choice]);
      if (some && !wanted[expert]) continue;
      add_expert(runtime.kernels, experts, all[expert], row, weights[choice], expected, bound);
    }
    for (int n = 0; n < hidden; ++n) {
      const auto at = static_cast<std::size_t>(n);
      if (y.dtype == Dtype::kF16 && std::fabs(expected[at]) > 60000.0) continue;
      check(y.get(t, n), expected[at], bound[at] + rounding(y.dtype, expected[at]),
            "token " + std::to_string(t) + ", output " + std::to_string(n));
    }
  }
}

void fuzz_pool(Runtime &runtime) {
  context += ", pool";
  for (int region = pick(1, 30); region > 0; --region) {
    const int steps = pick(1, ThreadPool::kMaxSteps), items = pick(0, 100);
    std::vector<std::atomic<int>> done(static_cast<std::size_t>(items));
    runtime.pool.run(
        [&](Worker &worker) {
          for (int step = 0; step < steps; ++step) {
            worker.share(items, [&](std::int64_t item) {
              // All items of the steps before are finished.
              const auto next = static_cast<std::size_t>((item + 1) % items);
              if (done[next].load() < step) fail("a step began before the last one ended");
              done[static_cast<std::size_t>(item)].fetch_add(1);
            });
          }
        },
        chance(0.3));
    for (const auto &count : done) {
      if (count.load() != steps) fail("an item was not done once in every step");
    }
  }
}

void fuzz_rows(Runtime &runtime) {
  context += ", norm";
  const int cols = pick(1, 300);
  const auto count = static_cast<std::size_t>(cols);
  const Numbers x = Numbers::random(1, cols);
  Numbers out(x.dtype, 1, cols);
  Block<float> weight(count);
  for (std::size_t i = 0; i < count; ++i) weight[i] = normal();
  runtime.kernels.rms_norm(x.dtype, x.bytes.data(), weight.data(), 1e-5f, out.bytes.data(), cols);
  double squares = 0.0;
  for (int c = 0; c < cols; ++c) squares += x.get(0, c) * x.get(0, c);
  const double factor = 1.0 / std::sqrt(squares / cols + 1e-5);
  for (int c = 0; c < cols; ++c) {
    const double expected = x.get(0, c) * factor * weight[static_cast<std::size_t>(c)];
    const double bound = std::fabs(expected) * 0x1p-24 * (cols + 10);
    check(out.get(0, c), expected, bound + rounding(x.dtype, expected), std::to_string(c));
  }
}

void run_round(std::uint64_t seed, const std::vector<std::string> &levels) {
  random_bits.seed(seed);
  const std::string isa =
      levels[static_cast<std::size_t>(pick(0, static_cast<int>(levels.size()) - 1))];
  const int threads = pick(1, 4), spin_us = chance(0.5) ? 0 : 50;
  context =
      "seed " + std::to_string(seed) + ", " + isa + ", " + std::to_string(threads) + " threads";
  Runtime runtime(find_kernels(isa), threads, {}, spin_us);
  for (int repeat = pick(1, 2); repeat > 0; --repeat) {  // the second one finds memory in use
    static constexpr void (*kRounds[])(Runtime &) = {
        fuzz_linear,    fuzz_linear,   fuzz_linear,   fuzz_experts,        fuzz_experts,
        fuzz_experts,   fuzz_pool,     fuzz_rows,     fuzz_router,         fuzz_router,
        fuzz_pair_sum,  fuzz_ffn_half, fuzz_ffn_half, fuzz_attention_half, fuzz_attention_half,
        fuzz_lookahead, fuzz_residual, fuzz_residual, fuzz_markov};
    kRounds[pick(0, static_cast<int>(std::size(kRounds)) - 1)](runtime);
  }
}

}  // namespace

int main(int argc, char **argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 30.0;
  std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
  std::vector<std::string> levels = {"scalar_bf16"};
  for (const IsaLevel &level : isa_levels()) {
    if (level.usable()) levels.push_back(level.name);
  }
  std::printf("seed %llu, levels", static_cast<unsigned long long>(seed));
  for (const auto &level : levels) std::printf(" %s", level.c_str());
  std::printf("\n");
  std::fflush(stdout);
  const auto start = std::chrono::steady_clock::now();
  std::int64_t rounds = 0;
  do {
    run_round(seed++, levels);
    ++rounds;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() <
           seconds);
  std::printf("%lld rounds, every result within its bound\n", static_cast<long long>(rounds));
  return 0;
}
