// Layouts of packed matrices, packing and unpacking.
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "pack.h"

namespace nb = nanobind;

namespace moeserve {
namespace {

RowTarget make_target(const PackedLayout &layout, const Array &data, const ConstArray &row_ids,
                      std::int64_t count) {
  check_dtype<std::uint8_t>(data, "data", "uint8");
  check_contiguous(data, "data");
  check_size(data, "data", layout.bytes());
  check_dtype<std::int64_t>(row_ids, "row_ids", "int64");
  check_contiguous(row_ids, "row_ids");
  check_size(row_ids, "row_ids", static_cast<std::size_t>(count));
  const auto *ids = static_cast<const std::int64_t *>(row_ids.data());
  const std::int64_t limit = static_cast<std::int64_t>(layout.num_panels) * kPanelOutputs;
  for (std::int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= limit) {
      refuse("row_ids", std::to_string(ids[i]) + " is not within 0.." + std::to_string(limit - 1));
    }
  }
  return {&layout, static_cast<std::uint8_t *>(data.data()), ids, count};
}

std::int64_t rows_in(const ConstArray &array) {
  return array.ndim() > 0 ? static_cast<std::int64_t>(array.shape(0)) : 0;
}

bool pack(Runtime &runtime, const PackedLayout &layout, const Array &data,
          const ConstArray &row_ids, const ConstArray &source) {
  if (layout.format == Format::kMxfp4 || layout.format == Format::kFp8) {
    refuse("layout", "numbers are not packed into mxfp4 or fp8; pack their codes");
  }
  const Dtype dtype = float_dtype(source, "source");
  check_rows(source, "source", -1, layout.cols);
  const RowTarget target = make_target(layout, data, row_ids, rows_in(source));
  const std::int64_t stride = source.shape(0) > 1 ? source.stride(0) : layout.cols;
  const nb::gil_scoped_release release;
  return pack_numbers(runtime, target, dtype, source.data(), stride);
}

bool pack_codes(Runtime &runtime, const PackedLayout &layout, const Array &data,
                const ConstArray &row_ids, const ConstArray &codes, const ConstArray &scales) {
  const bool fp8 = layout.format == Format::kFp8;
  if (!fp8 && layout.format != Format::kMxfp4) refuse("layout", "codes are mxfp4 or fp8");
  if (!fp8 && layout.cols % 32 != 0) refuse("layout", "mxfp4 comes in blocks of 32 inputs");
  check_dtype<std::uint8_t>(codes, "codes", "uint8");
  check_rows(codes, "codes", -1, fp8 ? layout.cols : layout.cols / 2);
  const std::int64_t count = rows_in(codes);
  const std::int64_t groups = layout.num_groups;
  if (fp8) check_dtype<float>(scales, "scales", "float32");
  if (!fp8) check_dtype<std::uint8_t>(scales, "scales", "uint8");
  check_rows(scales, "scales", count, groups);
  const RowTarget target = make_target(layout, data, row_ids, count);
  const std::int64_t code_stride = count > 1 ? codes.stride(0) : 0;
  const std::int64_t scale_stride = count > 1 ? scales.stride(0) : 0;
  const auto *bytes = static_cast<const std::uint8_t *>(codes.data());
  const nb::gil_scoped_release release;
  if (fp8) {
    return pack_fp8(runtime, target, bytes, code_stride, static_cast<const float *>(scales.data()),
                    scale_stride);
  }
  return pack_mxfp4(runtime, target, bytes, code_stride,
                    static_cast<const std::uint8_t *>(scales.data()), scale_stride);
}

void unpack(const PackedLayout &layout, const ConstArray &data, const Array &out) {
  check_dtype<std::uint8_t>(data, "data", "uint8");
  check_contiguous(data, "data");
  check_size(data, "data", layout.bytes());
  check_dtype<float>(out, "out", "float32");
  check_rows(out, "out", layout.rows, layout.cols);
  check_contiguous(out, "out");
  const auto *panels = static_cast<const std::uint8_t *>(data.data());
  auto *numbers = static_cast<float *>(out.data());
  const nb::gil_scoped_release release;
  for (std::int64_t row = 0; row < layout.rows; ++row) {
    unpack_row(layout, panels, row, numbers + row * layout.cols);
  }
}

}  // namespace

void bind_packing(nb::module_ &m) {
  nb::class_<PackedLayout>(m, "Layout", "Shape and format of a packed matrix; see packed.h.")
      .def(
          "__init__",
          [](PackedLayout *self, int format, std::int64_t rows, std::int64_t cols, int group_cols,
             bool asymmetric, bool weight_only) {
            new (self) PackedLayout(make_layout(static_cast<Format>(format), rows, cols, group_cols,
                                                asymmetric, weight_only));
          },
          nb::arg("format"), nb::arg("rows"), nb::arg("cols"), nb::arg("group_cols") = 0,
          nb::arg("asymmetric") = false, nb::arg("weight_only") = false)
      .def_ro("rows", &PackedLayout::rows)
      .def_ro("cols", &PackedLayout::cols)
      .def_ro("group_cols", &PackedLayout::group_cols)
      .def_ro("asymmetric", &PackedLayout::asymmetric)
      .def_ro("weight_only", &PackedLayout::weight_only)
      .def_ro("num_panels", &PackedLayout::num_panels)
      .def_ro("num_groups", &PackedLayout::num_groups)
      .def_ro("panel_bytes", &PackedLayout::panel_bytes)
      .def_ro("padded_cols", &PackedLayout::padded_cols)
      .def_ro("scale_offset", &PackedLayout::scale_offset)
      .def_ro("factor_offset", &PackedLayout::factor_offset)
      .def_ro("zero_offset", &PackedLayout::zero_offset)
      .def_prop_ro("format",
                   [](const PackedLayout &layout) { return static_cast<int>(layout.format); })
      .def_prop_ro("num_bytes", &PackedLayout::bytes);
  m.def("pack", &pack, nb::arg("runtime"), nb::arg("layout"), nb::arg("data"), nb::arg("row_ids"),
        nb::arg("source"),
        "Packs rows of numbers [R, K] as rows `row_ids` [R] of `data`. False: one that has to be "
        "quantised is NaN or Inf.");
  m.def("pack_codes", &pack_codes, nb::arg("runtime"), nb::arg("layout"), nb::arg("data"),
        nb::arg("row_ids"), nb::arg("codes"), nb::arg("scales"),
        "Packs rows that are quantised already: mxfp4 [R, K / 2] with scales [R, K / 32] uint8, or "
        "e4m3 [R, K] with scales [R, ceil(K / 128)] float32. False: a code or scale is NaN.");
  m.def("unpack", &unpack, nb::arg("layout"), nb::arg("data"), nb::arg("out"),
        "Fills out [N, K] float32 with the numbers that `data` stands for.");
}

}  // namespace moeserve
