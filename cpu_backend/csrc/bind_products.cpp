// Linear layers, experts and norms as Python calls them.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings.h"
#include "linear.h"
#include "moe.h"
#include "pair_sum.h"
#include "tensor.h"

namespace nb = nanobind;

namespace moeserve {
namespace {

const std::uint8_t *packed_data(const PackedLayout &layout, const ConstArray &data,
                                const char *name) {
  check_dtype<std::uint8_t>(data, name, "uint8");
  check_contiguous(data, name);
  check_size(data, name, layout.bytes());
  check_aligned(data, name, sizeof(float));
  return static_cast<const std::uint8_t *>(data.data());
}

// A packed matrix that keeps its arrays alive.
class PackedMatrix {
 public:
  PackedMatrix(const PackedLayout &layout, ConstArray data, std::optional<ConstArray> bias)
      : matrix_{layout, packed_data(layout, data, "data"), nullptr}, data_(std::move(data)) {
    if (bias) {
      check_dtype<float>(*bias, "bias", "float32");
      check_contiguous(*bias, "bias");
      check_size(*bias, "bias", static_cast<std::size_t>(layout.rows));
      matrix_.bias = static_cast<const float *>(bias->data());
      bias_ = std::move(bias);
    }
  }

  void run(Runtime &runtime, const Tensor &x, const Tensor &out) const {
    const Dtype x_dtype = float_dtype(x, "x"), out_dtype = float_dtype(out, "out");
    check_rows(x, "x", -1, matrix_.layout.cols);
    const auto rows = static_cast<std::int64_t>(x.shape(0));
    check_rows(out, "out", rows, matrix_.layout.rows);
    if (rows == 0) return;
    const std::int64_t x_stride = rows > 1 ? x.stride(0) : 0;
    const std::int64_t out_stride = rows > 1 ? out.stride(0) : 0;
    const nb::gil_scoped_release release;
    linear(runtime, matrix_, x_dtype, x.data(), rows, x_stride, out_dtype, out.data(), out_stride);
  }

 private:
  Matrix matrix_;
  ConstArray data_;
  std::optional<ConstArray> bias_;
};

// The experts of a layer: records in one array, or wherever `set_record` says.
class PackedExperts {
 public:
  PackedExperts(const PackedLayout &gate_up, const PackedLayout &down, bool bias, int activation,
                float alpha, float limit, int num_experts) {
    const int inner_panels = (down.cols + kPanelOutputs - 1) / kPanelOutputs;
    if (gate_up.num_panels != 2 * inner_panels || gate_up.cols != down.rows) {
      refuse("gate_up", "its shape does not fit that of down");
    }
    if (num_experts < 1) refuse("num_experts", "must be at least 1");
    if (activation < 0 || activation > static_cast<int>(Activation::kSwigluClamped)) {
      refuse("activation", std::to_string(activation) + " is none");
    }
    experts_.gate_up = gate_up;
    experts_.down = down;
    experts_.activation = {static_cast<Activation>(activation), alpha, limit};
    experts_.down_offset = gate_up.bytes();
    std::size_t end = experts_.down_offset + down.bytes();
    if (bias) {
      experts_.gate_up_bias_offset = end;
      end += static_cast<std::size_t>(gate_up.num_panels) * kPanelOutputs * sizeof(float);
      experts_.down_bias_offset = end;
      end += static_cast<std::size_t>(down.num_panels) * kPanelOutputs * sizeof(float);
    }
    // Whole pages, so that records can be read and written by themselves.
    record_bytes_ = (end + 4095) / 4096 * 4096;
    experts_.records.assign(static_cast<std::size_t>(num_experts), nullptr);
    owners_.resize(static_cast<std::size_t>(num_experts));
  }

  std::size_t record_bytes() const { return record_bytes_; }
  std::size_t down_offset() const { return experts_.down_offset; }
  std::size_t gate_up_bias_offset() const { return experts_.gate_up_bias_offset; }
  std::size_t down_bias_offset() const { return experts_.down_bias_offset; }

  void set_record(int expert, ConstArray record) {
    if (expert < 0 || static_cast<std::size_t>(expert) >= experts_.records.size()) {
      refuse("expert", std::to_string(expert) + " is out of range");
    }
    check_dtype<std::uint8_t>(record, "record", "uint8");
    check_contiguous(record, "record");
    check_size(record, "record", record_bytes_);
    check_aligned(record, "record", sizeof(float));
    const auto at = static_cast<std::size_t>(expert);
    experts_.records[at] = static_cast<const std::uint8_t *>(record.data());
    owners_[at] = std::move(record);
  }

  // A job that wants the expert is refused from now on, so that its memory may be used otherwise.
  void clear_record(int expert) {
    if (expert < 0 || static_cast<std::size_t>(expert) >= experts_.records.size()) {
      refuse("expert", std::to_string(expert) + " is out of range");
    }
    const auto at = static_cast<std::size_t>(expert);
    experts_.records[at] = nullptr;
    owners_[at].reset();
  }

  // Checks everything; the arrays must stay alive and unchanged until the work is done.
  ExpertJob make_job(const Tensor &x, const Tensor &ids, const Tensor &weights,
                     const std::optional<Tensor> &wanted, const Tensor &out) const {
    ExpertJob job = {};
    job.dtype = float_dtype(x, "x");
    check_rows(x, "x", -1, experts_.gate_up.cols);
    job.num_tokens = static_cast<std::int64_t>(x.shape(0));
    job.x = x.data();
    job.x_stride = job.num_tokens > 1 ? x.stride(0) : 0;
    check_dtype<std::int64_t>(ids, "ids", "int64");
    check_contiguous(ids, "ids");
    job.top_k = ids.ndim() == 2 ? static_cast<int>(ids.shape(1)) : -1;
    check_rows(ids, "ids", job.num_tokens, job.top_k);
    job.ids = static_cast<const std::int64_t *>(ids.data());
    check_dtype<float>(weights, "weights", "float32");
    check_contiguous(weights, "weights");
    check_rows(weights, "weights", job.num_tokens, job.top_k);
    job.weights = static_cast<const float *>(weights.data());
    if (wanted) {
      check_dtype<std::uint8_t>(*wanted, "wanted", "uint8");
      check_contiguous(*wanted, "wanted");
      check_size(*wanted, "wanted", experts_.records.size());
      job.wanted = static_cast<const std::uint8_t *>(wanted->data());
    }
    for (std::int64_t i = 0; i < job.num_tokens * job.top_k; ++i) {
      const std::int64_t expert = job.ids[i];
      if (expert < 0 || static_cast<std::size_t>(expert) >= experts_.records.size()) {
        refuse("ids", std::to_string(expert) + " is not within 0.." +
                          std::to_string(experts_.records.size() - 1));
      }
      const bool used = job.wanted == nullptr || job.wanted[expert] != 0;
      if (used && experts_.records[static_cast<std::size_t>(expert)] == nullptr) {
        refuse("ids", "expert " + std::to_string(expert) + " has no record");
      }
    }
    job.y_dtype = float_dtype(out, "out");
    check_rows(out, "out", job.num_tokens, experts_.down.rows);
    check_contiguous(out, "out");
    job.y = out.data();
    return job;
  }

  void run(Runtime &runtime, const Tensor &x, const Tensor &ids, const Tensor &weights,
           const std::optional<Tensor> &wanted, const Tensor &out) const {
    const ExpertJob job = make_job(x, ids, weights, wanted, out);
    const nb::gil_scoped_release release;
    if (job.num_tokens > 0) run_experts(runtime, experts_, job);
  }

  std::shared_ptr<Ticket> submit(Runtime &runtime, const Tensor &x, const Tensor &ids,
                                 const Tensor &weights, const std::optional<Tensor> &wanted,
                                 const Tensor &out) const {
    const ExpertJob job = make_job(x, ids, weights, wanted, out);
    return runtime.pool.submit([this, &runtime, job] {
      if (job.num_tokens > 0) run_experts(runtime, experts_, job);
    });
  }

 private:
  Experts experts_ = {};
  std::size_t record_bytes_ = 0;
  std::vector<std::optional<ConstArray>> owners_;
};

void sum_expert_pairs(Runtime &runtime, const Tensor &pairs, const Tensor &ids,
                      const Tensor &weights, const Tensor &out) {
  PairSum sum = {};
  check_dtype<std::int64_t>(ids, "ids", "int64");
  check_contiguous(ids, "ids");
  if (ids.ndim() != 2) refuse("ids", "must have two dimensions");
  sum.num_tokens = static_cast<std::int64_t>(ids.shape(0));
  sum.top_k = static_cast<int>(ids.shape(1));
  sum.ids = static_cast<const std::int64_t *>(ids.data());
  check_dtype<float>(weights, "weights", "float32");
  check_contiguous(weights, "weights");
  check_rows(weights, "weights", sum.num_tokens, sum.top_k);
  sum.weights = static_cast<const float *>(weights.data());
  if (out.ndim() != 2) refuse("out", "must have two dimensions");
  sum.hidden = static_cast<std::int64_t>(out.shape(1));
  sum.y_dtype = float_dtype(out, "out");
  check_rows(out, "out", sum.num_tokens, sum.hidden);
  check_contiguous(out, "out");
  sum.y = out.data();
  check_dtype<float>(pairs, "pairs", "float32");
  check_contiguous(pairs, "pairs");
  check_rows(pairs, "pairs", sum.num_tokens * sum.top_k, sum.hidden);
  sum.pairs = static_cast<const float *>(pairs.data());
  const nb::gil_scoped_release release;
  if (sum.num_tokens > 0) sum_pairs(runtime, sum);
}

void rms_norm(Runtime &runtime, const Tensor &x, const Tensor &weight, float eps,
              const Tensor &out) {
  const Dtype dtype = float_dtype(x, "x");
  check_dtype<float>(weight, "weight", "float32");
  check_contiguous(weight, "weight");
  if (weight.ndim() != 1) refuse("weight", "must have one dimension");
  const auto cols = static_cast<std::int64_t>(weight.shape(0));
  check_rows(x, "x", -1, cols);
  const auto rows = static_cast<std::int64_t>(x.shape(0));
  if (float_dtype(out, "out") != dtype) refuse("out", "must have the dtype of x");
  check_rows(out, "out", rows, cols);
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t x_bytes = rows > 1 ? x.stride(0) * size : 0;
  const std::int64_t out_bytes = rows > 1 ? out.stride(0) * size : 0;
  const auto *from = static_cast<const std::uint8_t *>(x.data());
  auto *to = static_cast<std::uint8_t *>(out.data());
  const auto *factors = static_cast<const float *>(weight.data());
  const nb::gil_scoped_release release;
  const auto one = [&](std::int64_t row) {
    runtime.kernels.rms_norm(dtype, from + row * x_bytes, factors, eps, to + row * out_bytes,
                             static_cast<int>(cols));
  };
  constexpr std::int64_t kWorthSharing = 1 << 16;  // numbers; below, waking threads costs more
  if (rows * cols < kWorthSharing) {
    for (std::int64_t row = 0; row < rows; ++row) one(row);
  } else {
    runtime.pool.run([&](Worker &worker) { worker.share(rows, one); });
  }
}

}  // namespace

void bind_products(nb::module_ &m) {
  nb::class_<PackedMatrix>(m, "PackedMatrix", "A packed weight [N, K] with an optional bias [N].")
      .def(nb::init<const PackedLayout &, ConstArray, std::optional<ConstArray>>(),
           nb::arg("layout"), nb::arg("data"), nb::arg("bias") = nb::none())
      .def("run", &PackedMatrix::run, nb::arg("runtime"), nb::arg("x"), nb::arg("out"),
           "out [T, N] = x [T, K] times the transposed matrix, plus bias.");
  nb::class_<PackedExperts>(m, "PackedExperts", "The experts of one layer; see moe.h.")
      .def(nb::init<const PackedLayout &, const PackedLayout &, bool, int, float, float, int>(),
           nb::arg("gate_up"), nb::arg("down"), nb::arg("bias"), nb::arg("activation"),
           nb::arg("alpha"), nb::arg("limit"), nb::arg("num_experts"))
      .def_prop_ro("record_bytes", &PackedExperts::record_bytes)
      .def_prop_ro("down_offset", &PackedExperts::down_offset)
      .def_prop_ro("gate_up_bias_offset", &PackedExperts::gate_up_bias_offset)
      .def_prop_ro("down_bias_offset", &PackedExperts::down_bias_offset)
      .def("set_record", &PackedExperts::set_record, nb::arg("expert"), nb::arg("record"))
      .def("clear_record", &PackedExperts::clear_record, nb::arg("expert"))
      .def("run", &PackedExperts::run, nb::arg("runtime"), nb::arg("x"), nb::arg("ids"),
           nb::arg("weights"), nb::arg("wanted").none(), nb::arg("out"))
      .def("submit", &PackedExperts::submit, nb::arg("runtime"), nb::arg("x"), nb::arg("ids"),
           nb::arg("weights"), nb::arg("wanted").none(), nb::arg("out"),
           "As run, but returns at once with a Ticket. All arrays must live until it is done.");
  m.def("sum_pairs", &sum_expert_pairs, nb::arg("runtime"), nb::arg("pairs"), nb::arg("ids"),
        nb::arg("weights"), nb::arg("out"),
        "out [T, H] = what `run` gives, from the pairs' outputs [T * K, H]; see pair_sum.h.");
  m.def("rms_norm", &rms_norm, nb::arg("runtime"), nb::arg("x"), nb::arg("weight"), nb::arg("eps"),
        nb::arg("out"), "out = x / sqrt(mean(x^2) + eps) * weight, row by row.");
}

}  // namespace moeserve
