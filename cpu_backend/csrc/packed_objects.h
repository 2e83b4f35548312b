// Packed matrices and experts as objects of Python: they check what they are given and keep it
// alive.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "linear.h"
#include "moe.h"
#include "python_lock.h"
#include "tensor.h"

namespace moeserve {

inline const std::uint8_t *packed_data(const PackedLayout &layout, const ConstArray &data,
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

  const Matrix &matrix() const { return matrix_; }

  void run(Runtime &runtime, const Tensor &x, const Tensor &out) const {
    const Dtype x_dtype = float_dtype(x, "x"), out_dtype = float_dtype(out, "out");
    check_rows(x, "x", -1, matrix_.layout.cols);
    const auto rows = static_cast<std::int64_t>(x.shape(0));
    check_rows(out, "out", rows, matrix_.layout.rows);
    if (rows == 0) return;
    const std::int64_t x_stride = rows > 1 ? x.stride(0) : 0;
    const std::int64_t out_stride = rows > 1 ? out.stride(0) : 0;
    void *result = out.written("out");
    const PythonLockGivenUp without(rows, matrix_.layout.bytes());
    linear(runtime, matrix_, x_dtype, x.data(), rows, x_stride, out_dtype, result, out_stride);
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

  const Experts &experts() const { return experts_; }
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
    ExpertChoice &choice = job.lists[0];
    job.num_lists = 1;
    choice.experts = &experts_;
    choice.top_k = check_choices(ids, job.num_tokens);
    choice.ids = static_cast<const std::int64_t *>(ids.data());
    check_dtype<float>(weights, "weights", "float32");
    check_contiguous(weights, "weights");
    check_rows(weights, "weights", job.num_tokens, choice.top_k);
    choice.weights = static_cast<const float *>(weights.data());
    if (wanted) {
      check_dtype<std::uint8_t>(*wanted, "wanted", "uint8");
      check_contiguous(*wanted, "wanted");
      check_size(*wanted, "wanted", experts_.records.size());
      choice.wanted = static_cast<const std::uint8_t *>(wanted->data());
    }
    for (std::int64_t i = 0; i < job.num_tokens * choice.top_k; ++i) {
      const std::int64_t expert = choice.ids[i];
      if (expert < 0 || static_cast<std::size_t>(expert) >= experts_.records.size()) {
        refuse("ids", std::to_string(expert) + " is not within 0.." +
                          std::to_string(experts_.records.size() - 1));
      }
      const bool used = choice.wanted == nullptr || choice.wanted[expert] != 0;
      if (used && experts_.records[static_cast<std::size_t>(expert)] == nullptr) {
        refuse("ids", "expert " + std::to_string(expert) + " has no record");
      }
    }
    job.y_dtype = float_dtype(out, "out");
    check_rows(out, "out", job.num_tokens, experts_.down.rows);
    check_contiguous(out, "out");
    job.y = out.written("out");
    return job;
  }

  void run(Runtime &runtime, const Tensor &x, const Tensor &ids, const Tensor &weights,
           const std::optional<Tensor> &wanted, const Tensor &out) const {
    const ExpertJob job = make_job(x, ids, weights, wanted, out);
    const PythonLockGivenUp without(job.num_tokens * job.lists[0].top_k, record_bytes_);
    if (job.num_tokens > 0) run_experts(runtime, job);
  }

  std::shared_ptr<Ticket> submit(Runtime &runtime, const Tensor &x, const Tensor &ids,
                                 const Tensor &weights, const std::optional<Tensor> &wanted,
                                 const Tensor &out) const {
    const ExpertJob job = make_job(x, ids, weights, wanted, out);
    return runtime.pool.submit([this, &runtime, job] {
      if (job.num_tokens > 0) run_experts(runtime, job);
    });
  }

 private:
  Experts experts_ = {};
  std::size_t record_bytes_ = 0;
  std::vector<std::optional<ConstArray>> owners_;
};

}  // namespace moeserve
