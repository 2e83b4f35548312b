// Linear layers, experts and norms as Python calls them.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings.h"
#include "decoder.h"
#include "expert_parts.h"
#include "packed_objects.h"
#include "python_lock.h"
#include "tensor.h"

namespace nb = nanobind;

namespace moeserve {
namespace {

// ExpertParts for arrays that stay alive and unchanged from `begin` to `total`.
class Parts {
 public:
  void begin(const Tensor &x, const Tensor &ids) {
    PartsJob job = {};
    job.dtype = float_dtype(x, "x");
    if (x.ndim() != 2) refuse("x", "must have two dimensions");
    job.hidden = static_cast<std::int64_t>(x.shape(1));
    check_rows(x, "x", -1, job.hidden);
    job.num_tokens = static_cast<std::int64_t>(x.shape(0));
    job.x = x.data();
    job.x_stride = job.num_tokens > 1 ? x.stride(0) : 0;
    job.top_k = check_choices(ids, job.num_tokens);
    job.ids = static_cast<const std::int64_t *>(ids.data());
    for (std::int64_t i = 0; i < job.num_pairs(); ++i) {
      if (job.ids[i] < 0) refuse("ids", std::to_string(job.ids[i]) + " is below 0");
    }
    parts_.begin(job);
  }

  void add(Runtime &runtime, const PackedExperts &packed, const std::vector<int> &experts) {
    const Experts &own = packed.experts();
    if (own.gate_up.cols != parts_.job().hidden) refuse("packed", "its width is not that of x");
    for (const int expert : experts) {
      if (expert < 0) refuse("experts", std::to_string(expert) + " is below 0");
    }
    const std::int64_t count = parts_.select(experts);
    for (const std::int64_t pair : parts_.selected()) {
      const std::int64_t id = parts_.job().ids[pair];
      if (static_cast<std::size_t>(id) >= own.records.size()) {
        refuse("ids",
               std::to_string(id) + " is not within 0.." + std::to_string(own.records.size() - 1));
      }
      if (own.records[static_cast<std::size_t>(id)] == nullptr) {
        refuse("ids", "expert " + std::to_string(id) + " has no record");
      }
    }
    const PythonLockGivenUp without(count, packed.record_bytes());
    parts_.add(runtime, own);
  }

  void put(const Tensor &pairs, const Tensor &results) {
    check_dtype<std::int64_t>(pairs, "pairs", "int64");
    check_contiguous(pairs, "pairs");
    if (pairs.ndim() != 1) refuse("pairs", "must have one dimension");
    const auto count = static_cast<std::int64_t>(pairs.shape(0));
    const auto *numbers = static_cast<const std::int64_t *>(pairs.data());
    for (std::int64_t i = 0; i < count; ++i) {
      if (numbers[i] < 0 || numbers[i] >= parts_.job().num_pairs()) {
        refuse("pairs", std::to_string(numbers[i]) + " is not within the job");
      }
    }
    check_dtype<float>(results, "results", "float32");
    check_contiguous(results, "results");
    check_rows(results, "results", count, parts_.job().hidden);
    parts_.put(numbers, count, static_cast<const float *>(results.data()));
  }

  void total(Runtime &runtime, const Tensor &weights, const Tensor &out) {
    const PartsJob &job = parts_.job();
    check_dtype<float>(weights, "weights", "float32");
    check_contiguous(weights, "weights");
    check_rows(weights, "weights", job.num_tokens, job.top_k);
    const Dtype dtype = float_dtype(out, "out");
    check_rows(out, "out", job.num_tokens, job.hidden);
    check_contiguous(out, "out");
    const auto pair_bytes = static_cast<std::size_t>(job.hidden) * sizeof(float);
    void *y = out.written("out");
    const PythonLockGivenUp without(job.num_pairs(), pair_bytes);
    parts_.total(runtime, static_cast<const float *>(weights.data()), dtype, y);
  }

  nb::ndarray<nb::numpy, float, nb::ndim<2>> rows() {
    const PartsJob &job = parts_.job();
    return {parts_.rows(),
            {static_cast<std::size_t>(job.num_pairs()), static_cast<std::size_t>(job.hidden)},
            nb::find(this)};
  }

 private:
  ExpertParts parts_;
};

void norm_rows(Runtime &runtime, const Tensor &x, const Tensor &weight, float eps,
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
  if (rows == 0) return;
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t x_bytes = rows > 1 ? x.stride(0) * size : 0;
  const std::int64_t out_bytes = rows > 1 ? out.stride(0) * size : 0;
  const Norm norm = {static_cast<const float *>(weight.data()), eps};
  void *result = out.written("out");
  const PythonLockGivenUp without(rows, static_cast<std::size_t>(cols * size));
  rms_norm(runtime, dtype, norm, x.data(), x_bytes, result, out_bytes, rows,
           static_cast<int>(cols));
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
  nb::class_<Parts>(m, "ExpertParts", "One job after another, in parts; see expert_parts.h.")
      .def(nb::init<>())
      .def("begin", &Parts::begin, nb::arg("x"), nb::arg("ids"),
           "A job: x [T, H], ids [T, K], which must live and stay as they are until `total`.")
      .def("add", &Parts::add, nb::arg("runtime"), nb::arg("packed"), nb::arg("experts"),
           "Computes these experts, which no part had before.")
      .def("put", &Parts::put, nb::arg("pairs"), nb::arg("results"),
           "What was computed elsewhere: results [P, H] of pairs [P], numbered t * K + k.")
      .def("total", &Parts::total, nb::arg("runtime"), nb::arg("weights"), nb::arg("out"),
           "out [T, H] = the weighted sums; what no part gave adds nothing.")
      .def("rows", &Parts::rows, "[T * K, H] float32, of which parts have written their rows.");
  m.def("rms_norm", &norm_rows, nb::arg("runtime"), nb::arg("x"), nb::arg("weight"), nb::arg("eps"),
        nb::arg("out"), "out = x / sqrt(mean(x^2) + eps) * weight, row by row.");
}

}  // namespace moeserve
