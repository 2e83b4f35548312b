#include "moe.h"

#include <algorithm>
#include <vector>

#include "expert_list.h"

namespace moeserve {
namespace {

// Panels of an item: see linear.cpp.
constexpr std::int64_t kDownPanels = 4;
constexpr std::int64_t kDownPanelsMany = 18;  // about; see DownItems
constexpr std::int64_t kAloneBytes = 64 * 1024;

// The panels of all outputs as items. With few rows they are short. With many rows an item passes
// over all rows of all experts, so that it has to be long; then threads end together because each
// has as many items as the others, and these are as equal as whole tiles allow.
class DownItems {
 public:
  DownItems(const Kernels &kernels, const PackedLayout &outputs, bool many, std::int64_t threads)
      : num_panels_(outputs.num_panels),
        unit_(many ? kernels.tile_panels(outputs) : kDownPanels),
        num_units_(std::max<std::int64_t>(1, num_panels_ / unit_)) {
    const std::int64_t num_long = (num_panels_ + kDownPanelsMany - 1) / kDownPanelsMany;
    const std::int64_t num_even = (num_long + threads - 1) / threads * threads;
    count_ = many ? std::min(num_units_, num_even) : num_units_;
  }

  std::int64_t count() const { return count_; }
  // Of item `count`: the end. Item 0 also has what is less than a unit, so it has no unit more than
  // another; the longest is the first or the last.
  std::int64_t first_panel(std::int64_t item) const {
    if (item == 0) return 0;
    return num_panels_ - ((count_ - item) * num_units_ + count_ - 1) / count_ * unit_;
  }
  std::int64_t most_panels() const {
    return std::max(first_panel(1), num_panels_ - first_panel(count_ - 1));
  }

 private:
  std::int64_t num_panels_, unit_, num_units_, count_;
};

// An item of all lists together: the list that it belongs to, and its number there.
struct Place {
  std::size_t list;
  std::int64_t item;
};

template <class Count>
Place place_of(const std::vector<ExpertList> &lists, std::int64_t item, const Count &count) {
  std::size_t list = 0;
  for (std::int64_t own; item >= (own = (lists[list].*count)()); ++list) item -= own;
  return {list, item};
}

template <class Count>
std::int64_t sum_of(const std::vector<ExpertList> &lists, const Count &count) {
  std::int64_t sum = 0;
  for (const ExpertList &list : lists) sum += (list.*count)();
  return sum;
}

}  // namespace

void run_experts(Runtime &runtime, const ExpertJob &job) {
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  const Kernels &kernels = runtime.kernels;
  Workspace &workspace = runtime.workspace;
  std::vector<ExpertList> lists;
  lists.reserve(kMaxExpertLists);
  for (int i = 0; i < job.num_lists; ++i) {
    RowBuffer &own = job.apart == nullptr ? workspace.input : *job.input;
    lists.emplace_back(runtime, job, job.lists[i], i == 0 ? own : workspace.other_input,
                       workspace.experts[i], i == 0 ? nullptr : &lists[0]);
  }

  const PackedLayout &outputs = job.lists[0].experts->down;
  bool many = true;
  std::size_t out_numbers = 0, row_numbers = 0;
  for (const ExpertList &list : lists) many = many && list.has_many_rows();
  const DownItems down_items(kernels, outputs, many, runtime.pool.num_threads());
  const std::int64_t down_panels = down_items.most_panels();
  for (const ExpertList &list : lists) {
    out_numbers = std::max(out_numbers, list.out_numbers(down_panels));
    row_numbers = std::max(row_numbers, list.row_numbers());
  }
  const std::int64_t num_sums = job.apart == nullptr ? job.num_tokens : 0;
  const auto sum_numbers = static_cast<std::size_t>(num_sums * down_panels * kPanelOutputs);
  const std::size_t thread_numbers = out_numbers + sum_numbers + row_numbers;
  for (auto &scratch : workspace.per_thread) scratch.take<float>(thread_numbers);

  const auto x_bytes = static_cast<std::int64_t>(size_of(job.dtype)) * job.x_stride;
  const auto prepare = [&](std::int64_t token) {
    const auto *x = static_cast<const std::uint8_t *>(job.x) + token * x_bytes;
    for (const ExpertList &list : lists) list.prepare(job.dtype, x, token);
  };
  const auto gate_up = [&](const ThreadNumbers &numbers, std::int64_t item, std::int64_t next) {
    const auto count = &ExpertList::num_gate_up_items;
    const Place place = place_of(lists, item, count);
    ReadNext ahead;
    if (next >= 0) {
      const Place after = place_of(lists, next, count);
      ahead = lists[after.list].gate_up_reads(after.item);
    }
    lists[place.list].gate_up(numbers, place.item, ahead);
  };
  const auto down = [&](const ThreadNumbers &numbers, std::int64_t item, std::int64_t next) {
    const std::int64_t panel = down_items.first_panel(item);
    const std::int64_t panels = down_items.first_panel(item + 1) - panel;
    const std::int64_t width = panels * kPanelOutputs, first = panel * kPanelOutputs;
    const auto count = static_cast<int>(std::min<std::int64_t>(width, outputs.rows - first));
    for (std::size_t i = 0; i < lists.size(); ++i) {
      const bool last = i + 1 == lists.size();
      ReadNext ahead;
      if (!last) {
        ahead = lists[i + 1].down_reads(panel);
      } else if (next >= 0) {
        ahead = lists[0].down_reads(down_items.first_panel(next));
      }
      lists[i].down(numbers, panel, panels, ahead);
      if (job.apart != nullptr) continue;  // it is there
      for (std::int64_t t = 0; t < job.num_tokens; ++t) {
        auto *y = static_cast<std::uint8_t *>(job.y) +
                  static_cast<std::size_t>(t * outputs.rows + first) * size_of(job.y_dtype);
        const float *sums = numbers.sums + t * width;
        kernels.from_float(job.y_dtype, sums, i == 0 ? y : static_cast<void *>(numbers.out), count);
        if (i > 0) kernels.add(job.y_dtype, y, numbers.out, count);
      }
    }
  };

  const auto round_hidden = [&](std::int64_t item) {
    const Place place = place_of(lists, item, &ExpertList::num_hidden_items);
    lists[place.list].round_hidden(place.item);
  };
  const std::int64_t num_hidden = sum_of(lists, &ExpertList::num_hidden_items);
  const std::int64_t num_gate_up = sum_of(lists, &ExpertList::num_gate_up_items);
  const auto region = [&](Worker &worker) {
    float *out =
        workspace.per_thread[static_cast<std::size_t>(worker.index())].take<float>(thread_numbers);
    const ThreadNumbers numbers = {out, out + out_numbers, out + out_numbers + sum_numbers};
    Laps laps(runtime.parts, worker.index() == 0);
    if (!job.is_prepared) worker.share_rows(job.num_tokens, prepare);
    laps.end(Part::kRows);
    worker.share_ahead(num_gate_up,
                       [&](std::int64_t item, std::int64_t next) { gate_up(numbers, item, next); });
    laps.end(Part::kGateUp);
    if (num_hidden > 0) worker.share(num_hidden, round_hidden);
    laps.end(Part::kHidden);
    worker.share_ahead(down_items.count(),
                       [&](std::int64_t item, std::int64_t next) { down(numbers, item, next); });
    laps.end(Part::kDown);
  };
  runtime.pool.run(region, sum_of(lists, &ExpertList::read_bytes) < kAloneBytes);
}

}  // namespace moeserve
