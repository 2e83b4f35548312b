#include "residual_predictor.h"

#include <algorithm>

namespace moeserve {
namespace {

constexpr std::int64_t kAloneBytes = 128 * 1024;  // of weights times rows, at most
constexpr std::int64_t kItemPanels = 4;
constexpr std::int64_t kRowsPerItem = 96;  // they stay in a core's second-level cache
constexpr int kItemColumns = 128;
constexpr float kEps = 1e-12f;

void silu(const Kernels &kernels, float *x, int count, float *scratch) {
  std::copy_n(x, count, scratch);
  kernels.sigmoid(scratch, count);
  for (int i = 0; i < count; ++i) x[i] *= scratch[i];
}

}  // namespace

// One call: what it reads and writes, and its items.
struct ResidualPredictor::Work {
  const Kernels &kernels;
  const ResidualView &view;
  const RoutedRows &rows;
  const std::int64_t *before;     // [num_rows] as in begin_step
  const float *past, *past_next;  // [rows of the step before, view.rank], or null
  RowFormat format;
  Rows prepared;
  const float *ones;  // [H]
  float *states;      // [num_rows, H]
  float *products;    // [num_rows, width]
  float *units;       // [num_rows, top_k, view.units]
  float *weights;     // [num_rows, top_k], with a mean of one

  const PackedLayout &layout() const { return view.products.layout; }
  int width() const { return layout().rows; }
  int top_k() const { return view.num_ahead > 0 ? rows.top_k : 0; }
  float *total(std::int64_t row) const { return products + row * width(); }
  std::int64_t panel_items() const { return (layout().num_panels + kItemPanels - 1) / kItemPanels; }
  std::int64_t row_items() const { return (rows.num_rows + kRowsPerItem - 1) / kRowsPerItem; }
  std::int64_t blocks() const { return (view.outputs + kItemColumns - 1) / kItemColumns; }
  int scratch_size() const { return std::max(view.rank, top_k() * view.units); }
  std::size_t unit_bytes() const {
    return static_cast<std::size_t>(view.units / kPanelOutputs) * layout().panel_bytes;
  }

  void prepare(std::int64_t row) const;
  void multiply(std::int64_t item) const;   // some panels, for some rows
  void run_units(std::int64_t item) const;  // of one expert, for one row
  void add_contexts(std::int64_t row, float *scratch) const;
  void add_outputs(std::int64_t row, int begin, int end) const;
};

ResidualPredictor::ResidualPredictor(int num_layers, int num_experts)
    : num_experts_(num_experts),
      places_(static_cast<std::size_t>(num_layers)),
      place_(num_layers) {}  // whatever layer comes first begins a step

void ResidualPredictor::set_view(int place, const ResidualView &view) {
  Place &own = places_[static_cast<std::size_t>(place)];
  own.view = view;
  own.is_set = true;
}

void ResidualPredictor::begin_step(const std::int64_t *previous_rows, std::int64_t num_rows) {
  told_.assign(previous_rows, previous_rows + num_rows);
  // The step before was not seen: nothing is known of rows that go on from it.
  if (is_told_) std::fill(told_.begin(), told_.end(), -1);
  is_told_ = true;
  place_ = static_cast<int>(places_.size());  // whatever layer comes first begins the step
}

// What was told is taken if it can be meant for this step; see predictors/row_links.py.
void ResidualPredictor::turn(std::int64_t num_rows) {
  const std::int64_t num_done = num_rows_;
  ++step_;
  num_rows_ = num_rows;
  const auto too_large = [&](std::int64_t row) { return row >= num_done; };
  if (is_told_ && static_cast<std::int64_t>(told_.size()) == num_rows &&
      std::none_of(told_.begin(), told_.end(), too_large)) {
    before_ = told_;
  } else {
    before_.resize(static_cast<std::size_t>(num_rows));
    for (std::int64_t row = 0; row < num_rows; ++row) {
      before_[static_cast<std::size_t>(row)] = num_done == num_rows ? row : -1;
    }
  }
  is_told_ = false;
}

// What the rows of the last step left at a layer, `rank` numbers each; null where they did not.
const float *ResidualPredictor::last(int place, std::vector<float> Past::*part, int rank) const {
  if (static_cast<std::size_t>(place) >= places_.size()) return nullptr;
  const Past &past = places_[static_cast<std::size_t>(place)].past[(step_ - 1) & 1];
  const std::vector<float> &numbers = past.*part;
  const bool fits = numbers.size() == count_of(past.num_rows, rank);
  return past.step == step_ - 1 && fits ? numbers.data() : nullptr;
}

bool ResidualPredictor::is_brief(int place, const RoutedRows &rows) const {
  const ResidualView &view = places_[static_cast<std::size_t>(place)].view;
  const PackedLayout &layout = view.products.layout;
  const std::int64_t num_units = view.num_ahead > 0 ? std::int64_t{rows.top_k} * view.units : 0;
  const auto of_units = static_cast<std::int64_t>(layout.panel_bytes) * num_units / kPanelOutputs;
  return rows.num_rows * (static_cast<std::int64_t>(layout.bytes()) + of_units) < kAloneBytes;
}

bool ResidualPredictor::predict(Runtime &runtime, int place, const RoutedRows &rows) {
  if (rows.num_rows == 0) return false;
  if (place <= place_ || rows.num_rows != num_rows_) turn(rows.num_rows);
  place_ = place;
  Place &own = places_[static_cast<std::size_t>(place)];
  if (!own.is_set) return false;
  const ResidualView &view = own.view;
  const Work work = begin(runtime.kernels, place, rows);
  const int scratch_size = work.scratch_size();
  auto *scratch = scratch_.take<float>(count_of(runtime.pool.num_threads(), scratch_size));
  const auto region = [&](Worker &worker) {
    worker.share(rows.num_rows, [&](std::int64_t row) { work.prepare(row); });
    const std::int64_t products = work.panel_items() * work.row_items();
    worker.share(products + rows.num_rows * work.top_k(), [&](std::int64_t item) {
      item < products ? work.multiply(item) : work.run_units(item - products);
    });
    if (view.num_ahead == 0) return;
    worker.share(rows.num_rows, [&](std::int64_t row) {
      work.add_contexts(row, scratch + worker.index() * scratch_size);
    });
    worker.share(rows.num_rows * work.blocks(), [&](std::int64_t item) {
      const int first = static_cast<int>(item % work.blocks()) * kItemColumns;
      work.add_outputs(item / work.blocks(), first, std::min(first + kItemColumns, view.outputs));
    });
  };
  runtime.pool.run(region, is_brief(place, rows));
  keep(own, work);
  for (int ahead = 0; ahead < view.num_ahead; ++ahead) {
    any_row(work.products + ahead * num_experts_, rows.num_rows, work.width(), num_experts_,
            view.out + ahead * num_experts_);
  }
  return view.num_ahead > 0;
}

ResidualPredictor::Work ResidualPredictor::begin(const Kernels &kernels, int place,
                                                 const RoutedRows &rows) {
  const ResidualView &view = places_[static_cast<std::size_t>(place)].view;
  const PackedLayout &layout = view.products.layout;
  const std::int64_t count = rows.num_rows, choices = count * rows.top_k;
  const RowFormat format = row_format(kernels, layout);
  auto *ones = ones_.take<float>(static_cast<std::size_t>(layout.cols));
  std::fill_n(ones, layout.cols, 1.0f);
  return {.kernels = kernels,
          .view = view,
          .rows = rows,
          .before = before_.data(),
          .past = last(place, &Past::own, view.rank),
          .past_next = last(place + 1, &Past::next, view.rank),
          .format = format,
          .prepared = prepared_.take(format, count),
          .ones = ones,
          .states = states_.take<float>(count_of(count, layout.cols)),
          .products = products_.take<float>(count_of(count, layout.rows)),
          .units = units_.take<float>(count_of(choices, view.units)),
          .weights = weights_.take<float>(count_of(choices, 1))};
}

// A row's state, its root mean square brought to one, in the form in which it is multiplied.
void ResidualPredictor::Work::prepare(std::int64_t row) const {
  const int hidden = layout().cols;
  const auto bytes = static_cast<std::int64_t>(size_of(rows.dtype)) * rows.x_stride;
  float *state = states + row * hidden;
  kernels.to_float(rows.dtype, static_cast<const std::uint8_t *>(rows.x) + row * bytes, state,
                   hidden);
  kernels.rms_norm(Dtype::kF32, state, ones, kEps, state, hidden);
  kernels.prepare_row(format, Dtype::kF32, state, prepared, row);
}

void ResidualPredictor::Work::multiply(std::int64_t item) const {
  const std::int64_t panel = item % panel_items() * kItemPanels;
  const std::int64_t row = item / panel_items() * kRowsPerItem;
  GemmJob job = {};
  job.panels = view.products.panels + static_cast<std::size_t>(panel) * layout().panel_bytes;
  job.layout = &layout();
  job.rows = rows_from(prepared, format, row);
  job.row_format = &format;
  job.num_rows = static_cast<int>(std::min(kRowsPerItem, rows.num_rows - row));
  job.num_panels = static_cast<int>(std::min(kItemPanels, layout().num_panels - panel));
  job.out = total(row) + panel * kPanelOutputs;
  job.out_stride = static_cast<std::size_t>(width());
  kernels.gemm(job);
}

void ResidualPredictor::Work::run_units(std::int64_t item) const {
  const auto expert = static_cast<std::size_t>(rows.ids[item]);
  GemmJob job = {};
  job.panels = view.expert_in.panels + expert * unit_bytes();
  job.layout = &view.expert_in.layout;
  job.rows = rows_from(prepared, format, item / rows.top_k);
  job.row_format = &format;
  job.num_rows = 1;
  job.num_panels = view.units / kPanelOutputs;
  job.out = units + item * view.units;
  job.out_stride = static_cast<std::size_t>(view.units);
  kernels.gemm(job);
  const float *bias = view.expert_in.bias + expert * job.out_stride;
  kernels.accumulate(job.out, bias, nullptr, 1.0f, view.units);
}

// A row's context, its activation, and the units of its experts, ready to be multiplied.
void ResidualPredictor::Work::add_contexts(std::int64_t row, float *scratch) const {
  const std::int64_t first = row * rows.top_k;
  const float *given = rows.weights + first;
  float sum = 0.0f;
  for (int k = 0; k < rows.top_k; ++k) sum += given[k];
  const float mean = sum / static_cast<float>(rows.top_k) + kEps;
  float *context = total(row) + view.outputs;
  kernels.accumulate(context, view.bias + view.outputs, nullptr, 1.0f, view.rank);
  const std::int64_t last = before[row];
  if (past != nullptr && past_next != nullptr && last >= 0) {
    const std::int64_t at = last * view.rank;
    kernels.accumulate(context, past + at, nullptr, 1.0f, view.rank);
    kernels.accumulate(context, past_next + at, nullptr, 1.0f, view.rank);
  }
  const std::int64_t stride = view.outputs + view.rank;
  for (int k = 0; k < rows.top_k; ++k) {
    weights[first + k] = given[k] / mean;
    const std::int64_t expert = rows.ids[first + k];
    kernels.accumulate(context, view.chosen + expert * stride + view.outputs, nullptr,
                       weights[first + k], view.rank);
  }
  silu(kernels, context, view.rank, scratch);
  silu(kernels, units + first * view.units, rows.top_k * view.units, scratch);
}

// Outputs begin..end-1 of a row: logits, then chances.
void ResidualPredictor::Work::add_outputs(std::int64_t row, int begin, int end) const {
  const int count = end - begin;
  const std::int64_t outputs = view.outputs, stride = view.outputs + view.rank;
  const float *context = total(row) + view.outputs;
  float *sums = total(row) + begin;
  const auto add = [&](const float *from, float factor) {
    kernels.accumulate(sums, from + begin, nullptr, factor, count);
  };
  add(view.bias, 1.0f);
  for (int r = 0; r < view.rank; ++r) add(view.context_out + r * outputs, context[r]);
  for (int k = 0; k < rows.top_k; ++k) {
    const std::int64_t place = row * rows.top_k + k, expert = rows.ids[place];
    const float weight = weights[place];
    const float *own = units + place * view.units;
    add(view.chosen + expert * stride, weight);
    for (int u = 0; u < view.units; ++u) {
      add(view.expert_out + (expert * view.units + u) * outputs, own[u] * weight);
    }
  }
  kernels.sigmoid(sums, count);
}

void ResidualPredictor::keep(Place &place, const Work &work) {
  const ResidualView &view = place.view;
  Past &past = place.past[step_ & 1];
  past.step = step_;
  past.num_rows = num_rows_;
  past.own.resize(count_of(num_rows_, view.rank));
  past.next.resize(count_of(num_rows_, view.next_rank));
  for (std::int64_t row = 0; row < num_rows_; ++row) {
    const float *own = work.total(row) + view.outputs + view.rank;
    std::copy_n(own, view.rank, past.own.begin() + row * view.rank);
    std::copy_n(own + view.rank, view.next_rank, past.next.begin() + row * view.next_rank);
  }
}

}  // namespace moeserve
