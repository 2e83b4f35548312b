#include "linear.h"

#include <algorithm>

namespace moeserve {
namespace {

// Work is cut into items of some panels and some rows. Few rows: the panels of an item are read
// from memory once and take some 10 us, so that threads end together. Many rows: the rows of an
// item stay in the core's second-level cache while its panels pass by.
constexpr std::int64_t kDecodeItemBytes = 128 * 1024;
constexpr std::int64_t kRowsPerItem = 128;
constexpr std::int64_t kPanelsPerItem = 12;
constexpr std::int64_t kItemsPerThread = 4;  // of the rows that stand together
// A thread takes its second item when it starts the first, so with fewer some threads get none.
constexpr std::int64_t kFewestItemsPerThread = 2;
constexpr std::int64_t kAloneBytes = 64 * 1024;  // of weights times rows, at most

}  // namespace

bool is_alone(const Matrix &matrix, std::int64_t num_rows) {
  return static_cast<std::int64_t>(matrix.layout.bytes()) * num_rows < kAloneBytes;
}

void linear(Runtime &runtime, const Matrix &matrix, Dtype x_dtype, const void *x,
            std::int64_t num_rows, std::int64_t x_stride, Dtype y_dtype, void *y,
            std::int64_t y_stride) {
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  const PackedLayout &layout = matrix.layout;
  const Kernels &kernels = runtime.kernels;
  const RowFormat format = row_format(kernels, layout);
  const Rows rows = runtime.workspace.input.take(format, num_rows);

  const bool few = num_rows <= 4;
  const std::int64_t by_bytes =
      kDecodeItemBytes / static_cast<std::int64_t>(layout.panel_bytes) / 4 * 4;
  const auto for_each_thread = [&](std::int64_t items) {
    return layout.num_panels / (items * runtime.pool.num_threads());
  };
  const std::int64_t item_panels =
      few ? std::min(std::clamp<std::int64_t>(by_bytes, 4, 64),
                     std::max<std::int64_t>(1, for_each_thread(kFewestItemsPerThread)))
          : std::clamp<std::int64_t>(for_each_thread(kItemsPerThread) / 2 * 2, 2, kPanelsPerItem);
  const std::int64_t panel_items = (layout.num_panels + item_panels - 1) / item_panels;
  const std::int64_t row_items = (num_rows + kRowsPerItem - 1) / kRowsPerItem;

  const auto x_bytes = static_cast<std::int64_t>(size_of(x_dtype)) * x_stride;
  const auto y_size = static_cast<std::int64_t>(size_of(y_dtype));
  const std::size_t out_numbers =
      static_cast<std::size_t>(std::min(num_rows, kRowsPerItem) * item_panels * kPanelOutputs);
  for (auto &scratch : runtime.workspace.per_thread) scratch.take<float>(out_numbers);

  const auto panels_at = [&](std::int64_t panel) {
    return matrix.panels + static_cast<std::size_t>(panel) * layout.panel_bytes;
  };
  const auto region = [&](Worker &worker) {
    worker.share_rows(num_rows, [&](std::int64_t row) {
      kernels.prepare_row(format, x_dtype, static_cast<const std::uint8_t *>(x) + row * x_bytes,
                          rows, row);
    });
    auto *out = runtime.workspace.per_thread[static_cast<std::size_t>(worker.index())].take<float>(
        out_numbers);
    const auto panel_of = [&](std::int64_t item) { return item % panel_items * item_panels; };
    worker.share_ahead(panel_items * row_items, [&](std::int64_t item, std::int64_t next) {
      const std::int64_t panel = panel_of(item);
      const std::int64_t row = item / panel_items * kRowsPerItem;
      const std::int64_t panels = std::min(item_panels, layout.num_panels - panel);
      const std::int64_t count = std::min(kRowsPerItem, num_rows - row);
      const GemmJob job = {
          .panels = panels_at(panel),
          .layout = &layout,
          .rows = rows_from(rows, format, row),
          .row_ids = nullptr,
          .row_format = &format,
          .num_rows = static_cast<int>(count),
          .num_panels = static_cast<int>(panels),
          .out = out,
          .out_stride = static_cast<std::size_t>(panels * kPanelOutputs),
          .next = next < 0 ? nullptr : panels_at(panel_of(next)),
          .num_next = static_cast<int>(std::min(item_panels, layout.num_panels - panel_of(next))),
          .next_rows = nullptr,
          .next_rows_bytes = 0,
      };
      kernels.gemm(job);
      const std::int64_t first = panel * kPanelOutputs;
      const std::int64_t outputs =
          std::min<std::int64_t>(panels * kPanelOutputs, layout.rows - first);
      for (std::int64_t r = 0; r < count; ++r) {
        float *line = out + static_cast<std::size_t>(r) * job.out_stride;
        if (matrix.bias != nullptr) {
          for (std::int64_t i = 0; i < outputs; ++i) line[i] += matrix.bias[first + i];
        }
        kernels.from_float(y_dtype, line,
                           static_cast<std::uint8_t *>(y) + ((row + r) * y_stride + first) * y_size,
                           outputs);
      }
    });
  };
  runtime.pool.run(region, is_alone(matrix, num_rows));
}

}  // namespace moeserve
