#include "moe.h"

#include <algorithm>

namespace moeserve {
namespace {

// Panels of an item: see linear.cpp. Those of gate_up come in pairs; with many rows multiples of 3
// and of 2 are best, the widths of tiles (gemm_cover.h).
constexpr std::int64_t kGateUpPanels = 4;
constexpr std::int64_t kDownPanels = 4;
constexpr std::int64_t kAloneBytes = 64 * 1024;
constexpr std::int64_t kManyRows = 8;
constexpr std::int64_t kExpertsPerThread = 4;
constexpr std::int64_t kGateUpPanelsMany = 24;
constexpr std::int64_t kDownPanelsMany = 18;

// One choice of a token. Sorted by expert; `row` of the hidden state is its place in that order.
struct Pair {
  std::int64_t expert;
  std::int64_t token;
  float weight;
};

struct Group {
  std::int64_t expert;
  std::int64_t first;  // pair
  std::int64_t count;
};

struct Plan {
  std::vector<Pair> pairs;
  std::vector<std::int32_t> tokens;  // of the pairs
  std::vector<Group> groups;
};

Plan make_plan(const Experts &experts, const ExpertJob &job) {
  Plan plan;
  const std::size_t num_experts = experts.records.size();
  const std::int64_t choices = job.num_tokens * job.top_k;
  std::vector<std::int64_t> start(num_experts + 1, 0);
  const auto wanted = [&](std::int64_t expert) {
    return job.wanted == nullptr || job.wanted[expert] != 0;
  };
  for (std::int64_t i = 0; i < choices; ++i) {
    if (wanted(job.ids[i])) ++start[static_cast<std::size_t>(job.ids[i]) + 1];
  }
  for (std::size_t e = 0; e < num_experts; ++e) {
    const std::int64_t count = start[e + 1];
    if (count > 0) {
      plan.groups.push_back({static_cast<std::int64_t>(e), start[e], count});
    }
    start[e + 1] += start[e];
  }
  plan.pairs.resize(static_cast<std::size_t>(start[num_experts]));
  plan.tokens.resize(plan.pairs.size());
  for (std::int64_t i = 0; i < choices; ++i) {
    const std::int64_t expert = job.ids[i];
    if (!wanted(expert)) continue;
    const auto place = static_cast<std::size_t>(start[static_cast<std::size_t>(expert)]++);
    plan.pairs[place] = {expert, i / job.top_k, job.weights[i]};
    plan.tokens[place] = static_cast<std::int32_t>(i / job.top_k);
  }
  return plan;
}

std::int64_t items_of(std::int64_t panels, std::int64_t per_item) {
  return (panels + per_item - 1) / per_item;
}

}  // namespace

void run_experts(Runtime &runtime, const Experts &experts, const ExpertJob &job) {
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  const Kernels &kernels = runtime.kernels;
  Workspace &workspace = runtime.workspace;
  const Plan plan = make_plan(experts, job);
  const auto num_pairs = static_cast<std::int64_t>(plan.pairs.size());
  const auto num_groups = static_cast<std::int64_t>(plan.groups.size());

  const RowFormat in_format = row_format(kernels, experts.gate_up);
  const RowFormat hidden_format = row_format(kernels, experts.down);
  const Rows input = workspace.input.take(in_format, job.num_tokens);
  const Rows hidden = workspace.hidden.take(hidden_format, num_pairs);
  // Activations go straight into the rows of the second product where those are floats.
  const std::size_t inner =
      static_cast<std::size_t>(experts.gate_up.num_panels / 2) * kPanelOutputs;
  const bool direct = hidden_format.form == RowForm::kF32;
  const std::size_t activated_stride = direct ? hidden_format.data_bytes / 4 : inner;

  std::int64_t most_rows = 0;
  for (const Group &group : plan.groups) most_rows = std::max(most_rows, group.count);
  const bool many = num_pairs >= kManyRows * num_groups;
  // Where there are experts enough, a thread computes all of one's gate and up, and its activations
  // are rounded before they leave the thread's cache.
  const bool whole =
      many && !direct && num_groups >= kExpertsPerThread * runtime.pool.num_threads();
  float *activated =
      direct  ? reinterpret_cast<float *>(hidden.data)
      : whole ? nullptr
              : workspace.activated.take<float>(static_cast<std::size_t>(num_pairs) * inner);
  const std::int64_t gate_up_panels = many ? kGateUpPanelsMany : kGateUpPanels;
  const std::int64_t down_panels = many ? kDownPanelsMany : kDownPanels;
  const std::int64_t gate_up_items = items_of(experts.gate_up.num_panels, gate_up_panels);
  const std::int64_t down_items = items_of(experts.down.num_panels, down_panels);
  const auto out_numbers =
      static_cast<std::size_t>(most_rows * std::max(gate_up_panels, down_panels) * kPanelOutputs);
  const auto sum_numbers = static_cast<std::size_t>(job.num_tokens * down_panels * kPanelOutputs);
  const std::size_t own_numbers =
      whole ? static_cast<std::size_t>(most_rows) * activated_stride : 0;
  const std::size_t thread_numbers = out_numbers + sum_numbers + own_numbers;
  for (auto &scratch : workspace.per_thread) scratch.take<float>(thread_numbers);

  const auto x_bytes = static_cast<std::int64_t>(size_of(job.dtype)) * job.x_stride;
  const auto gate_up_at = [&](std::int64_t item) {
    const Group &group = plan.groups[static_cast<std::size_t>(item / gate_up_items)];
    const std::int64_t panel = item % gate_up_items * gate_up_panels;
    return experts.records[static_cast<std::size_t>(group.expert)] +
           static_cast<std::size_t>(panel) * experts.gate_up.panel_bytes;
  };
  const auto down_at = [&](const Group &group, std::int64_t item) {
    return experts.records[static_cast<std::size_t>(group.expert)] + experts.down_offset +
           static_cast<std::size_t>(item * down_panels) * experts.down.panel_bytes;
  };

  // Panels `item` of the experts' gate and up. rows: where the activations of its expert go.
  const auto gate_up = [&](float *out, float *rows, std::int64_t item, std::int64_t next) {
    const Group &group = plan.groups[static_cast<std::size_t>(item / gate_up_items)];
    const std::int64_t panel = item % gate_up_items * gate_up_panels;
    const std::int64_t panels = std::min(gate_up_panels, experts.gate_up.num_panels - panel);
    const std::uint8_t *record = experts.records[static_cast<std::size_t>(group.expert)];
    const GemmJob gemm = {
        .panels = gate_up_at(item),
        .layout = &experts.gate_up,
        .rows = input,
        .row_ids = plan.tokens.data() + group.first,
        .row_format = &in_format,
        .num_rows = static_cast<int>(group.count),
        .num_panels = static_cast<int>(panels),
        .out = out,
        .out_stride = static_cast<std::size_t>(panels * kPanelOutputs),
        .next = next < 0 ? nullptr : gate_up_at(next),
        .num_next = static_cast<int>(gate_up_panels),
        .next_rows = nullptr,
        .next_rows_bytes = 0,
    };
    kernels.gemm(gemm);
    const float *bias = nullptr;
    if (experts.gate_up_bias_offset != 0) {
      bias = reinterpret_cast<const float *>(record + experts.gate_up_bias_offset) +
             panel * kPanelOutputs;
    }
    for (std::int64_t r = 0; r < group.count; ++r) {
      float *row = rows + static_cast<std::size_t>(r) * activated_stride;
      float *target = row + panel / 2 * kPanelOutputs;
      kernels.gated(experts.activation, out + static_cast<std::size_t>(r) * gemm.out_stride, bias,
                    target, static_cast<int>(panels / 2));
      if (panel + panels == experts.gate_up.num_panels) {  // the padding of the second product
        std::fill(row + inner, row + activated_stride, 0.0f);
      }
    }
  };

  const auto whole_expert = [&](float *out, std::int64_t index, std::int64_t next) {
    const Group &group = plan.groups[static_cast<std::size_t>(index)];
    float *rows = out + out_numbers + sum_numbers;
    const std::int64_t first = index * gate_up_items;
    for (std::int64_t i = 0; i < gate_up_items; ++i) {
      const bool last = i + 1 == gate_up_items;
      gate_up(out, rows, first + i, !last ? first + i + 1 : next < 0 ? -1 : next * gate_up_items);
    }
    for (std::int64_t r = 0; r < group.count; ++r) {
      kernels.prepare_row(hidden_format, Dtype::kF32,
                          rows + static_cast<std::size_t>(r) * activated_stride, hidden,
                          group.first + r);
    }
  };
  const auto part_of_expert = [&](float *out, std::int64_t item, std::int64_t next) {
    const Group &group = plan.groups[static_cast<std::size_t>(item / gate_up_items)];
    gate_up(out, activated + static_cast<std::size_t>(group.first) * activated_stride, item, next);
  };

  const auto down = [&](float *out, std::int64_t item, std::int64_t next) {
    const std::int64_t panel = item * down_panels;
    const std::int64_t panels = std::min(down_panels, experts.down.num_panels - panel);
    const std::int64_t width = panels * kPanelOutputs;
    float *sums = out + out_numbers;
    std::fill_n(sums, job.num_tokens * width, 0.0f);
    for (const Group &group : plan.groups) {
      const std::uint8_t *record = experts.records[static_cast<std::size_t>(group.expert)];
      const bool last = &group == &plan.groups.back();
      const Group &follower = last ? plan.groups.front() : *(&group + 1);
      const bool ends = last && next < 0;
      const Rows follower_rows = rows_from(hidden, hidden_format, follower.first);
      const GemmJob gemm = {
          .panels = down_at(group, item),
          .layout = &experts.down,
          .rows = rows_from(hidden, hidden_format, group.first),
          .row_ids = nullptr,
          .row_format = &hidden_format,
          .num_rows = static_cast<int>(group.count),
          .num_panels = static_cast<int>(panels),
          .out = out,
          .out_stride = static_cast<std::size_t>(width),
          .next = ends ? nullptr : down_at(follower, last ? next : item),
          .num_next = static_cast<int>(panels),
          .next_rows = ends ? nullptr : follower_rows.data,
          .next_rows_bytes = static_cast<std::size_t>(follower.count) * hidden_format.data_bytes,
      };
      kernels.gemm(gemm);
      const float *bias = nullptr;
      if (experts.down_bias_offset != 0) {
        bias = reinterpret_cast<const float *>(record + experts.down_bias_offset) +
               panel * kPanelOutputs;
      }
      for (std::int64_t r = 0; r < group.count; ++r) {
        const Pair &pair = plan.pairs[static_cast<std::size_t>(group.first + r)];
        kernels.accumulate(sums + pair.token * width, out + r * width, bias, pair.weight,
                           static_cast<int>(width));
      }
    }
    const std::int64_t first = panel * kPanelOutputs;
    const std::int64_t outputs = std::min<std::int64_t>(width, experts.down.rows - first);
    for (std::int64_t t = 0; t < job.num_tokens; ++t) {
      auto *y = static_cast<std::uint8_t *>(job.y) +
                static_cast<std::size_t>(t * experts.down.rows + first) * size_of(job.y_dtype);
      kernels.from_float(job.y_dtype, sums + t * width, y, outputs);
    }
  };

  const auto bytes = static_cast<std::int64_t>(experts.gate_up.bytes() + experts.down.bytes());
  const bool alone = bytes * num_pairs < kAloneBytes;
  const auto region = [&](Worker &worker) {
    float *out =
        workspace.per_thread[static_cast<std::size_t>(worker.index())].take<float>(thread_numbers);
    Laps laps(runtime.parts, worker.index() == 0);
    worker.share(job.num_tokens, [&](std::int64_t token) {
      const auto *x = static_cast<const std::uint8_t *>(job.x) + token * x_bytes;
      kernels.prepare_row(in_format, job.dtype, x, input, token);
    });
    laps.end(Part::kRows);
    if (whole) {
      worker.share_ahead(num_groups, [&](std::int64_t index, std::int64_t next) {
        whole_expert(out, index, next);
      });
    } else {
      worker.share_ahead(num_groups * gate_up_items, [&](std::int64_t item, std::int64_t next) {
        part_of_expert(out, item, next);
      });
    }
    laps.end(Part::kGateUp);
    if (!direct && !whole) {
      worker.share(num_pairs, [&](std::int64_t pair) {
        const float *row = activated + static_cast<std::size_t>(pair) * activated_stride;
        kernels.prepare_row(hidden_format, Dtype::kF32, row, hidden, pair);
      });
    }
    laps.end(Part::kHidden);
    worker.share_ahead(down_items,
                       [&](std::int64_t item, std::int64_t next) { down(out, item, next); });
    laps.end(Part::kDown);
  };
  runtime.pool.run(region, alone);
}

}  // namespace moeserve
