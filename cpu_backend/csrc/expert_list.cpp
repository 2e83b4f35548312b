#include "expert_list.h"

#include <algorithm>
#include <functional>

namespace moeserve {
namespace {

// Panels of an item: see linear.cpp. Those of gate_up come in pairs; with many rows multiples of 3
// and of 2 are best, the widths of tiles (gemm_cover.h). With few rows long items are best, too, as
// long as threads end together: the streams of one tile go on where those of the last end.
constexpr std::int64_t kFewestGateUpPanels = 4;
constexpr std::int64_t kGateUpPanels = 24;
constexpr std::int64_t kGateUpItemsPerThread = 16;
constexpr std::int64_t kManyRows = 8;
constexpr std::int64_t kExpertsPerThread = 4;
// Rows of a group, at most: what a product of more leaves behind does not stay in a core's cache.
constexpr std::int64_t kGroupRows = 256;

// Panels of another size are not asked for: a product asks for as many bytes as its own have.
const std::uint8_t *alike(const ReadNext &next, const PackedLayout &layout) {
  return next.panel_bytes == layout.panel_bytes ? next.panels : nullptr;
}

bool same_rows(const RowFormat &a, const RowFormat &b) {
  return a.form == b.form && a.cols == b.cols && a.num_groups == b.num_groups &&
         a.group_cols == b.group_cols && a.zero == b.zero && a.row_zero == b.row_zero &&
         a.data_bytes == b.data_bytes;
}

}  // namespace

ExpertList::ExpertList(Runtime &runtime, const ExpertJob &job, const ExpertChoice &choice,
                       RowBuffer &input, ExpertMemory &memory, const ExpertList *other)
    : kernels_(runtime.kernels),
      experts_(*choice.experts),
      num_tokens_(job.num_tokens),
      apart_(job.apart),
      // Rows that are kept for other parts may be of use to them.
      used_(job.num_lists == 1 && choice.wanted != nullptr && job.apart == nullptr
                ? static_cast<std::size_t>(job.num_tokens)
                : 0),
      in_format_(row_format(kernels_, experts_.gate_up)),
      hidden_format_(row_format(kernels_, experts_.down)),
      prepares_(other == nullptr || !same_rows(in_format_, other->in_format_)),
      input_(prepares_ ? input.take(in_format_, num_tokens_) : other->input_),
      direct_(hidden_format_.form == RowForm::kF32) {
  sort_choices(choice);
  const auto num_pairs = static_cast<std::int64_t>(pairs_.size());
  const auto num_groups = static_cast<std::int64_t>(groups_.size());
  hidden_ = memory.hidden.take(hidden_format_, num_pairs);
  inner_ = static_cast<std::size_t>(experts_.gate_up.num_panels / 2) * kPanelOutputs;
  activated_stride_ = direct_ ? hidden_format_.data_bytes / 4 : inner_;
  for (const Group &group : groups_) most_rows_ = std::max(most_rows_, group.count);
  many_ = num_pairs >= kManyRows * num_groups;
  // Where there are experts enough, a thread computes all of one's gate and up, and its activations
  // are rounded before they leave the thread's cache.
  whole_ = many_ && !direct_ && num_groups >= kExpertsPerThread * runtime.pool.num_threads();
  if (direct_) {
    activated_ = reinterpret_cast<float *>(hidden_.data);
  } else if (!whole_) {
    activated_ = memory.activated.take<float>(static_cast<std::size_t>(num_pairs) * inner_);
  }
  const std::int64_t for_each_thread = num_groups * experts_.gate_up.num_panels /
                                       (kGateUpItemsPerThread * runtime.pool.num_threads());
  gate_up_panels_ = many_ ? kGateUpPanels
                          : std::clamp(for_each_thread / kFewestGateUpPanels * kFewestGateUpPanels,
                                       kFewestGateUpPanels, kGateUpPanels);
  gate_up_items_ = (experts_.gate_up.num_panels + gate_up_panels_ - 1) / gate_up_panels_;
}

void ExpertList::sort_choices(const ExpertChoice &choice) {
  const std::size_t num_experts = experts_.records.size();
  const std::int64_t choices = num_tokens_ * choice.top_k;
  std::vector<std::int64_t> start(num_experts + 1, 0);
  const auto wanted = [&](std::int64_t expert) {
    return choice.wanted == nullptr || choice.wanted[expert] != 0;
  };
  for (std::int64_t i = 0; i < choices; ++i) {
    if (wanted(choice.ids[i])) ++start[static_cast<std::size_t>(choice.ids[i]) + 1];
  }
  for (std::size_t e = 0; e < num_experts; ++e) {
    const std::int64_t count = start[e + 1];
    const std::int64_t parts = (count + kGroupRows - 1) / kGroupRows;
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t first = part * count / parts;
      groups_.push_back(
          {static_cast<std::int64_t>(e), start[e] + first, (part + 1) * count / parts - first});
    }
    start[e + 1] += start[e];
  }
  pairs_.resize(static_cast<std::size_t>(start[num_experts]));
  tokens_.resize(pairs_.size());
  for (std::int64_t i = 0; i < choices; ++i) {
    const std::int64_t expert = choice.ids[i];
    if (!wanted(expert)) continue;
    const auto place = static_cast<std::size_t>(start[static_cast<std::size_t>(expert)]++);
    const std::int64_t token = i / choice.top_k;
    const float weight = choice.weights == nullptr ? 1.0f : choice.weights[i];
    pairs_[place] = {expert, token, i, weight};
    tokens_[place] = static_cast<std::int32_t>(token);
    if (!used_.empty()) used_[static_cast<std::size_t>(token)] = 1;
  }
}

std::int64_t ExpertList::read_bytes() const {
  return static_cast<std::int64_t>((experts_.gate_up.bytes() + experts_.down.bytes()) *
                                   pairs_.size());
}

std::size_t ExpertList::out_numbers(std::int64_t down_panels) const {
  return static_cast<std::size_t>(most_rows_ * std::max(gate_up_panels_, down_panels) *
                                  kPanelOutputs);
}

std::size_t ExpertList::row_numbers() const {
  return whole_ ? static_cast<std::size_t>(most_rows_) * activated_stride_ : 0;
}

std::int64_t ExpertList::num_gate_up_items() const {
  const auto num_groups = static_cast<std::int64_t>(groups_.size());
  return whole_ ? num_groups : num_groups * gate_up_items_;
}

ReadNext ExpertList::gate_up_reads(std::int64_t item) const {
  return panels_of(whole_ ? item * gate_up_items_ : item);
}

ReadNext ExpertList::panels_of(std::int64_t item) const {
  const std::int64_t panel = item % gate_up_items_ * gate_up_panels_;
  const std::size_t bytes = experts_.gate_up.panel_bytes;
  return {record(group_of(item)) + static_cast<std::size_t>(panel) * bytes, bytes};
}

void ExpertList::gate_up(const ThreadNumbers &numbers, std::int64_t item,
                         const ReadNext &next) const {
  if (whole_) {
    whole_expert(numbers, item, next);
    return;
  }
  const auto first = static_cast<std::size_t>(group_of(item).first);
  gate_up_panels(numbers.out, activated_ + first * activated_stride_, item, next);
}

void ExpertList::whole_expert(const ThreadNumbers &numbers, std::int64_t index,
                              const ReadNext &next) const {
  const Group &group = groups_[static_cast<std::size_t>(index)];
  const std::int64_t first = index * gate_up_items_;
  for (std::int64_t i = 0; i < gate_up_items_; ++i) {
    const bool last = i + 1 == gate_up_items_;
    gate_up_panels(numbers.out, numbers.rows, first + i, last ? next : panels_of(first + i + 1));
  }
  for (std::int64_t r = 0; r < group.count; ++r) {
    kernels_.prepare_row(hidden_format_, Dtype::kF32,
                         numbers.rows + static_cast<std::size_t>(r) * activated_stride_, hidden_,
                         group.first + r);
  }
}

void ExpertList::gate_up_panels(float *out, float *rows, std::int64_t item,
                                const ReadNext &next) const {
  const Group &group = group_of(item);
  const std::int64_t panel = item % gate_up_items_ * gate_up_panels_;
  const std::int64_t panels = std::min(gate_up_panels_, experts_.gate_up.num_panels - panel);
  const GemmJob gemm = {
      .panels = panels_of(item).panels,
      .layout = &experts_.gate_up,
      .rows = input_,
      .row_ids = tokens_.data() + group.first,
      .row_format = &in_format_,
      .num_rows = static_cast<int>(group.count),
      .num_panels = static_cast<int>(panels),
      .out = out,
      .out_stride = static_cast<std::size_t>(panels * kPanelOutputs),
      .next = alike(next, experts_.gate_up),
      .num_next = static_cast<int>(gate_up_panels_),
      .next_rows = nullptr,
      .next_rows_bytes = 0,
  };
  kernels_.gemm(gemm);
  const float *bias = bias_of(group, experts_.gate_up_bias_offset, panel);
  for (std::int64_t r = 0; r < group.count; ++r) {
    float *row = rows + static_cast<std::size_t>(r) * activated_stride_;
    float *target = row + panel / 2 * kPanelOutputs;
    kernels_.gated(experts_.activation, out + static_cast<std::size_t>(r) * gemm.out_stride, bias,
                   target, static_cast<int>(panels / 2));
    if (panel + panels == experts_.gate_up.num_panels) {  // the padding of the second product
      std::fill(row + inner_, row + activated_stride_, 0.0f);
    }
  }
}

std::int64_t ExpertList::num_hidden_items() const {
  return direct_ || whole_ ? 0 : static_cast<std::int64_t>(pairs_.size());
}

void ExpertList::round_hidden(std::int64_t pair) const {
  const float *row = activated_ + static_cast<std::size_t>(pair) * activated_stride_;
  kernels_.prepare_row(hidden_format_, Dtype::kF32, row, hidden_, pair);
}

ReadNext ExpertList::down_reads(std::int64_t panel, std::size_t group) const {
  if (group >= groups_.size()) return {};
  const Group &next = groups_[group];
  const std::size_t bytes = experts_.down.panel_bytes;
  return {record(next) + experts_.down_offset + static_cast<std::size_t>(panel) * bytes, bytes,
          rows_from(hidden_, hidden_format_, next.first).data,
          static_cast<std::size_t>(next.count) * hidden_format_.data_bytes};
}

void ExpertList::down(const ThreadNumbers &numbers, std::int64_t panel, std::int64_t num_panels,
                      const ReadNext &next) const {
  const std::int64_t width = num_panels * kPanelOutputs;
  if (apart_ == nullptr) std::fill_n(numbers.sums, num_tokens_ * width, 0.0f);
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    const Group &group = groups_[g];
    const ReadNext follower = g + 1 < groups_.size() ? down_reads(panel, g + 1) : next;
    const GemmJob gemm = {
        .panels = down_reads(panel, g).panels,
        .layout = &experts_.down,
        .rows = rows_from(hidden_, hidden_format_, group.first),
        .row_ids = nullptr,
        .row_format = &hidden_format_,
        .num_rows = static_cast<int>(group.count),
        .num_panels = static_cast<int>(num_panels),
        .out = numbers.out,
        .out_stride = static_cast<std::size_t>(width),
        .next = alike(follower, experts_.down),
        .num_next = static_cast<int>(num_panels),
        .next_rows = follower.rows,
        .next_rows_bytes = follower.rows_bytes,
    };
    kernels_.gemm(gemm);
    const float *bias = bias_of(group, experts_.down_bias_offset, panel);
    for (std::int64_t r = 0; r < group.count; ++r) {
      const Pair &pair = pairs_[static_cast<std::size_t>(group.first + r)];
      if (apart_ != nullptr) {
        put_apart(pair, numbers.out + r * width, bias, panel, num_panels);
        continue;
      }
      kernels_.accumulate(numbers.sums + pair.token * width, numbers.out + r * width, bias,
                          pair.weight, static_cast<int>(width));
    }
  }
}

// Weights of choices that stand apart are the sum's (pair_sum.h).
void ExpertList::put_apart(const Pair &pair, const float *result, const float *bias,
                           std::int64_t panel, std::int64_t num_panels) const {
  const std::int64_t outputs = experts_.down.rows, first = panel * kPanelOutputs;
  const std::int64_t count = std::min(num_panels * kPanelOutputs, outputs - first);
  float *own = apart_ + pair.choice * outputs + first;
  if (bias == nullptr) {
    std::copy_n(result, count, own);
  } else {
    std::transform(result, result + count, bias, own, std::plus<float>());
  }
}

}  // namespace moeserve
