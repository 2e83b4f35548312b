// Routers and the halves of decoder layers as objects of Python: they check what they are given and
// keep it alive.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attention_arguments.h"
#include "decoder.h"
#include "packed_objects.h"

namespace moeserve {

// An array of float32 [count] that is kept alive.
inline const float *float_vector(const ConstArray &array, const char *name, std::size_t count) {
  check_dtype<float>(array, name, "float32");
  check_contiguous(array, name);
  check_size(array, name, count);
  return static_cast<const float *>(array.data());
}

class NativeRouter {
 public:
  NativeRouter(const PackedMatrix &gate, nanobind::object gate_owner, int top_k, int score,
               bool float32_logits, bool normalize, float normalize_eps, float scale,
               int num_groups, int top_groups, bool group_top2,
               std::optional<ConstArray> correction, bool round_weights)
      : gate_(gate), gate_owner_(std::move(gate_owner)), correction_(std::move(correction)) {
    const int experts = gate.matrix().layout.rows;
    if (score < 0 || score > 2) refuse("score", std::to_string(score) + " is none");
    if (num_groups < 1 || experts % num_groups != 0) {
      refuse("num_groups", std::to_string(num_groups) + " does not divide " +
                               std::to_string(experts) + " experts");
    }
    if (top_groups < 1 || top_groups > num_groups) {
      refuse("top_groups", std::to_string(top_groups) + "; 1 to " + std::to_string(num_groups));
    }
    const int reach = experts / num_groups * top_groups;
    if (top_k < 1 || top_k > reach) {
      refuse("top_k", std::to_string(top_k) + "; 1 to " + std::to_string(reach));
    }
    rule_ = {experts,        top_k,      static_cast<RouterScore>(score),
             float32_logits, normalize,  normalize_eps,
             scale,          num_groups, top_groups,
             group_top2,     nullptr,    round_weights};
    if (correction_) {
      rule_.correction =
          float_vector(*correction_, "correction", static_cast<std::size_t>(experts));
    }
  }

  const RouterRule &rule() const { return rule_; }
  const Matrix &gate() const { return gate_.matrix(); }

  void run(Runtime &runtime, const Tensor &x, const Tensor &ids, const Tensor &weights) const {
    const Dtype dtype = float_dtype(x, "x");
    check_rows(x, "x", -1, gate().layout.cols);
    const auto rows = static_cast<std::int64_t>(x.shape(0));
    check_dtype<std::int64_t>(ids, "ids", "int64");
    check_contiguous(ids, "ids");
    check_rows(ids, "ids", rows, rule_.top_k);
    check_dtype<float>(weights, "weights", "float32");
    check_contiguous(weights, "weights");
    check_rows(weights, "weights", rows, rule_.top_k);
    if (rows == 0) return;
    const std::int64_t stride = rows > 1 ? x.stride(0) : 0;
    auto *chosen = static_cast<std::int64_t *>(ids.written("ids"));
    auto *factors = static_cast<float *>(weights.written("weights"));
    const PythonLockGivenUp without(rows, gate().layout.bytes());
    route(runtime, gate(), rule_, dtype, x.data(), rows, stride, chosen, factors);
  }

 private:
  const PackedMatrix &gate_;
  nanobind::object gate_owner_;
  std::optional<ConstArray> correction_;
  RouterRule rule_ = {};
};

inline Stream stream_of(const Tensor &x, int hidden) {
  const Dtype dtype = float_dtype(x, "x");
  check_rows(x, "x", -1, hidden);
  check_contiguous(x, "x");
  return {dtype, x.written("x"), static_cast<std::int64_t>(x.shape(0)), hidden};
}

class AttentionLayer {
 public:
  AttentionLayer(ConstArray norm_weight, float norm_eps, const PackedMatrix &qkv,
                 const PackedMatrix &output, nanobind::object owners, int num_kv_heads,
                 int group_heads, int head_dim, std::optional<ConstArray> head_norm,
                 bool norm_together, float head_norm_eps, float clip, float scale,
                 std::int64_t window, std::optional<ConstArray> sinks)
      : norm_weight_(std::move(norm_weight)),
        head_norm_(std::move(head_norm)),
        sinks_(std::move(sinks)),
        owners_(std::move(owners)),
        hidden_(qkv.matrix().layout.cols) {
    half_ = {
        {float_vector(norm_weight_, "norm_weight", static_cast<std::size_t>(hidden_)), norm_eps},
        &qkv.matrix(),
        &output.matrix()};
    if (num_kv_heads < 1 || group_heads < 1 || head_dim < 1) {
      refuse("heads", "their numbers and sizes must be at least 1");
    }
    const std::int64_t of_qkv = std::int64_t{num_kv_heads} * (group_heads + 2) * head_dim;
    const std::int64_t of_mixed = std::int64_t{num_kv_heads} * group_heads * head_dim;
    if (qkv.matrix().layout.rows != of_qkv || output.matrix().layout.cols != of_mixed ||
        output.matrix().layout.rows != hidden_) {
      refuse("qkv, output", "their shapes do not fit the heads and each other");
    }
    if (!(clip > 0)) refuse("clip", "must be positive; infinite for none");
    if (!std::isfinite(scale)) refuse("scale", "must be finite");
    if (window < 0) refuse("window", std::to_string(window) + ", must not be negative");
    heads_.num_kv_heads = call_.num_kv_heads = num_kv_heads;
    heads_.group_heads = call_.group_heads = group_heads;
    heads_.head_dim = call_.key_dim = call_.value_start = call_.value_dim = head_dim;
    call_.width = 2 * head_dim;
    call_.window = window;
    call_.scale = scale;
    heads_.norm_together = norm_together;
    heads_.norm_eps = head_norm_eps;
    heads_.clip = clip;
    const auto one = static_cast<std::size_t>(group_heads + 1) * static_cast<std::size_t>(head_dim);
    if (head_norm_) {
      const bool shared = head_norm_->ndim() == 1 && head_norm_->shape(0) == one;
      heads_.norm_weight = float_vector(
          *head_norm_, "head_norm", shared ? one : one * static_cast<std::size_t>(num_kv_heads));
      heads_.norm_stride = shared ? 0 : static_cast<std::int64_t>(one);
    }
    if (sinks_) {
      call_.sinks =
          float_vector(*sinks_, "sinks", static_cast<std::size_t>(num_kv_heads * group_heads));
    }
  }

  // What a step says to every layer of its attention.
  struct Step {
    const AttentionSpans &spans;
    const Tensor &cosine, &sine, &write_slots;
  };
  struct Call {
    GroupedHeads heads;
    AttentionCall attention;
  };

  // Checks all arguments; holds the GIL.
  Call prepare(const Stream &stream, const Step &step, const Tensor &entries) const {
    const AttentionSpans &spans = step.spans;
    if (stream.hidden != hidden_) refuse("x", "its width is not that of the layer");
    if (stream.num_rows != spans.num_rows()) {
      refuse("x", std::to_string(stream.num_rows) + " rows, but the spans have " +
                      std::to_string(spans.num_rows()));
    }
    check_dtype_as(entries, "entries", stream.dtype, "x");
    check_dims(entries, "entries", 3);
    check_shape(entries, "entries", {size(entries, 0), call_.num_kv_heads, call_.width});
    check_contiguous(entries, "entries");
    if (spans.num_slots() > size(entries, 0)) {
      refuse("spans", "slot " + std::to_string(spans.num_slots() - 1) + " is not within 0.." +
                          std::to_string(size(entries, 0) - 1));
    }
    Call call = {heads_, call_};
    call.heads.dtype = call.attention.dtype = stream.dtype;
    call.heads.turns = turns_of(step.cosine, step.sine, stream.num_rows, heads_.head_dim);
    call.heads.entries = entries.written("entries");
    call.attention.entries = entries.data();
    call.heads.slots = slots(step.write_slots, "write_slots", stream.num_rows, size(entries, 0));
    return call;
  }

  void compute(Runtime &runtime, const Stream &stream, const Call &call,
               const AttentionSpans &spans) const {
    if (stream.num_rows == 0) return;
    run_attention(runtime, half_, stream, call.heads, call.attention, spans.spans());
  }

  void run(Runtime &runtime, const AttentionSpans &spans, const Tensor &x, const Tensor &cosine,
           const Tensor &sine, const Tensor &entries, const Tensor &write_slots) const {
    const Stream stream = stream_of(x, hidden_);
    const Call call = prepare(stream, {spans, cosine, sine, write_slots}, entries);
    const auto kv_bytes =
        static_cast<std::size_t>(spans.longest_context() * call_.num_kv_heads * call_.width) *
        size_of(stream.dtype);
    const PythonLockGivenUp without(
        stream.num_rows, half_.qkv->layout.bytes() + half_.output->layout.bytes() + kv_bytes);
    compute(runtime, stream, call, spans);
  }

  int hidden() const { return hidden_; }

 private:
  ConstArray norm_weight_;
  std::optional<ConstArray> head_norm_, sinks_;
  nanobind::object owners_;
  int hidden_;
  AttentionHalf half_ = {};
  GroupedHeads heads_ = {};
  AttentionCall call_ = {};
};

// A router, or None, and the experts that it chooses among.
using PartObjects = std::pair<nanobind::object, nanobind::object>;

class FfnLayer {
 public:
  FfnLayer(ConstArray norm_weight, float norm_eps, std::vector<PartObjects> parts)
      : norm_weight_(std::move(norm_weight)), owners_(std::move(parts)) {
    if (owners_.empty() || owners_.size() > static_cast<std::size_t>(kMaxExpertLists)) {
      refuse("parts",
             std::to_string(owners_.size()) + " of them; 1 to " + std::to_string(kMaxExpertLists));
    }
    for (const auto &[router, experts] : owners_) add_part(router, experts);
    const auto hidden = static_cast<std::size_t>(hidden_size());
    half_.norm = {float_vector(norm_weight_, "norm_weight", hidden), norm_eps};
  }

  void count_into(Array rows) {
    if (half_.parts[0].gate == nullptr) refuse("rows", "there is no router whose uses to count");
    check_dtype<std::int32_t>(rows, "rows", "int32");
    check_contiguous(rows, "rows");
    check_size(rows, "rows", static_cast<std::size_t>(half_.parts[0].rule.num_experts));
    uses_ = static_cast<std::int32_t *>(rows.data());
    counted_ = std::move(rows);
  }

  void check_records() const {
    for (int i = 0; i < half_.num_parts; ++i) {
      const auto &records = half_.parts[i].experts->records;
      for (std::size_t expert = 0; expert < records.size(); ++expert) {
        if (records[expert] == nullptr) {
          refuse("parts", "expert " + std::to_string(expert) + " has no record");
        }
      }
    }
  }

  void compute(Runtime &runtime, const Stream &stream) const {
    if (stream.num_rows > 0) run_ffn(runtime, half_, stream, uses_);
  }

  void run(Runtime &runtime, const Tensor &x) const {
    const Stream stream = stream_of(x, hidden_size());
    check_records();
    const nanobind::gil_scoped_release release;
    compute(runtime, stream);
  }

  int hidden_size() const { return half_.parts[0].experts->down.rows; }

 private:
  void add_part(const nanobind::object &router, const nanobind::object &experts) {
    FfnPart &part = half_.parts[half_.num_parts++];
    part.experts = &nanobind::cast<const PackedExperts &>(experts).experts();
    if (part.experts->down.rows != hidden_size()) refuse("parts", "their outputs differ in size");
    if (router.is_none()) return;
    const auto &chooses = nanobind::cast<const NativeRouter &>(router);
    part.gate = &chooses.gate();
    part.rule = chooses.rule();
    if (part.gate->layout.cols != hidden_size() ||
        part.experts->records.size() != static_cast<std::size_t>(part.rule.num_experts)) {
      refuse("parts", "the number of experts or their shape does not fit the router");
    }
  }

  ConstArray norm_weight_;
  std::vector<PartObjects> owners_;
  FfnHalf half_ = {};
  std::int32_t *uses_ = nullptr;
  Array counted_;  // what uses_ points into
};

}  // namespace moeserve
