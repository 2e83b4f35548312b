// Routers and decoder layers as Python calls them.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <optional>
#include <utility>
#include <vector>

#include "decoder_objects.h"
#include "turns.h"

namespace nb = nanobind;

namespace moeserve {
namespace {

// Final norm and head.
class Head {
 public:
  Head(ConstArray norm_weight, float norm_eps, const PackedMatrix &matrix, nb::object owner)
      : norm_weight_(std::move(norm_weight)), owner_(std::move(owner)), matrix_(matrix.matrix()) {
    const auto hidden = static_cast<std::size_t>(matrix_.layout.cols);
    norm_ = {float_vector(norm_weight_, "norm_weight", hidden), norm_eps};
  }

  void run(Runtime &runtime, const Tensor &x, const Tensor &logits) const {
    const Dtype dtype = float_dtype(x, "x");
    check_rows(x, "x", -1, matrix_.layout.cols);
    const auto rows = static_cast<std::int64_t>(x.shape(0));
    check_rows(logits, "logits", rows, matrix_.layout.rows);
    check_dtype<float>(logits, "logits", "float32");
    check_contiguous(logits, "logits");
    if (rows == 0) return;
    const std::int64_t x_bytes =
        rows > 1 ? x.stride(0) * static_cast<std::int64_t>(size_of(dtype)) : 0;
    auto *out = static_cast<float *>(logits.written("logits"));
    const nb::gil_scoped_release release;
    run_head(runtime, norm_, matrix_, dtype, x.data(), x_bytes, rows, out);
  }

 private:
  ConstArray norm_weight_;
  nb::object owner_;
  const Matrix &matrix_;
  Norm norm_ = {};
};

// The kv of all layers of a model. Holds the arrays.
class KvLayers {
 public:
  explicit KvLayers(const std::vector<nb::object> &entries) : owners_(entries) {
    for (const nb::object &own : entries) {
      if (!layers_.emplace_back().read(own)) refuse("entries", "one is no array on the CPU");
    }
  }

  std::size_t count() const { return layers_.size(); }
  const Tensor &layer(std::size_t index) const { return layers_[index]; }

 private:
  std::vector<Tensor> layers_;
  std::vector<nb::object> owners_;
};

void turn_positions(const Tensor &positions, const Tensor &frequencies, float amplitude,
                    const Tensor &cosine, const Tensor &sine) {
  check_dims(positions, "positions", 1);
  const std::int64_t rows = size(positions, 0);
  const std::int64_t *places =
      slots(positions, "positions", rows, std::numeric_limits<std::int64_t>::max());
  check_dims(frequencies, "frequencies", 2);
  const std::int64_t own = size(frequencies, 0), half = size(frequencies, 1);
  if (own != 1 && own != rows) refuse("frequencies", "of neither one row nor of each");
  const float *radians = floats(frequencies, "frequencies", {own, half});
  const RowTurns turns = turns_of(cosine, sine, rows, 2 * half);
  if (turns.dim != 2 * half) refuse("cosine", "must be twice as wide as frequencies");
  make_turns(places, rows, radians, own == 1 ? 0 : half, turns.dim, amplitude,
             static_cast<float *>(cosine.written("cosine")),
             static_cast<float *>(sine.written("sine")));
}

// The layers of a model, of which neighbours may run in one call.
class LayerStack {
 public:
  // layers: the two halves of each, or None for one that has to run otherwise. seconds: of every
  // layer's FFN, written by each run.
  LayerStack(const std::vector<nb::object> &layers, Array seconds)
      : owners_(layers), seconds_(std::move(seconds)) {
    check_dtype<double>(seconds_, "seconds", "float64");
    check_contiguous(seconds_, "seconds");
    check_size(seconds_, "seconds", layers.size());
    for (const nb::object &layer : layers) {
      if (layer.is_none()) {
        halves_.push_back({nullptr, nullptr});
        continue;
      }
      const auto pair = nb::cast<std::pair<nb::object, nb::object>>(layer);
      halves_.push_back({&nb::cast<const AttentionLayer &>(pair.first),
                         &nb::cast<const FfnLayer &>(pair.second)});
      if (halves_.back().attention->hidden() != halves_.back().ffn->hidden_size()) {
        refuse("layers", "the halves of one differ in their width");
      }
    }
  }

  void run(Runtime &runtime, std::size_t first, std::size_t stop, const Tensor &x,
           const AttentionSpans &spans, const Tensor &cosine, const Tensor &sine,
           const KvLayers &kv, const Tensor &write_slots) const {
    if (first >= stop || stop > halves_.size() || stop > kv.count()) {
      refuse("first, stop", std::to_string(first) + " to " + std::to_string(stop) + " of " +
                                std::to_string(halves_.size()) + " layers, " +
                                std::to_string(kv.count()) + " with kv");
    }
    auto *taken = static_cast<double *>(seconds_.data());
    std::vector<AttentionLayer::Call> calls;
    calls.reserve(stop - first);
    Stream stream = {};
    for (std::size_t i = first; i < stop; ++i) {
      const auto &[attention, ffn] = halves_[i];
      if (attention == nullptr) refuse("layers", std::to_string(i) + " has to run in its parts");
      if (i == first) stream = stream_of(x, attention->hidden());
      calls.push_back(attention->prepare(stream, {spans, cosine, sine, write_slots}, kv.layer(i)));
      ffn->check_records();
    }
    const nb::gil_scoped_release release;
    for (std::size_t i = first; i < stop; ++i) {
      halves_[i].attention->compute(runtime, stream, calls[i - first], spans);
      const auto start = std::chrono::steady_clock::now();
      halves_[i].ffn->compute(runtime, stream);
      taken[i] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  }

 private:
  struct Halves {
    const AttentionLayer *attention;
    const FfnLayer *ffn;
  };
  std::vector<Halves> halves_;
  std::vector<nb::object> owners_;
  Array seconds_;
};

}  // namespace

void bind_decoder(nb::module_ &m) {
  nb::class_<NativeRouter>(m, "Router", "The gate of one MoE layer; see router.h.")
      .def(
          "__init__",
          [](NativeRouter *self, nb::object gate, int top_k, int score, bool float32_logits,
             bool normalize, float normalize_eps, float scale, int num_groups, int top_groups,
             bool group_top2, std::optional<ConstArray> correction, bool round_weights) {
            new (self) NativeRouter(nb::cast<const PackedMatrix &>(gate), gate, top_k, score,
                                    float32_logits, normalize, normalize_eps, scale, num_groups,
                                    top_groups, group_top2, std::move(correction), round_weights);
          },
          nb::arg("gate"), nb::arg("top_k"), nb::arg("score"), nb::arg("float32_logits"),
          nb::arg("normalize"), nb::arg("normalize_eps"), nb::arg("scale"), nb::arg("num_groups"),
          nb::arg("top_groups"), nb::arg("group_top2"), nb::arg("correction").none(),
          nb::arg("round_weights"))
      .def("run", &NativeRouter::run, nb::arg("runtime"), nb::arg("x"), nb::arg("ids"),
           nb::arg("weights"), "Fills ids [T, K] int64 and weights [T, K] float32 for x [T, H].");
  nb::class_<AttentionLayer>(m, "AttentionLayer", "Norm and grouped attention; see decoder.h.")
      .def(
          "__init__",
          [](AttentionLayer *self, ConstArray norm_weight, float norm_eps, nb::object qkv,
             nb::object output, int num_kv_heads, int group_heads, int head_dim,
             std::optional<ConstArray> head_norm, bool norm_together, float head_norm_eps,
             float clip, float scale, std::int64_t window, std::optional<ConstArray> sinks) {
            new (self) AttentionLayer(
                std::move(norm_weight), norm_eps, nb::cast<const PackedMatrix &>(qkv),
                nb::cast<const PackedMatrix &>(output), nb::make_tuple(qkv, output), num_kv_heads,
                group_heads, head_dim, std::move(head_norm), norm_together, head_norm_eps, clip,
                scale, window, std::move(sinks));
          },
          nb::arg("norm_weight"), nb::arg("norm_eps"), nb::arg("qkv"), nb::arg("output"),
          nb::arg("num_kv_heads"), nb::arg("group_heads"), nb::arg("head_dim"),
          nb::arg("head_norm").none(), nb::arg("norm_together"), nb::arg("head_norm_eps"),
          nb::arg("clip"), nb::arg("scale"), nb::arg("window"), nb::arg("sinks").none())
      .def("run", &AttentionLayer::run, nb::arg("runtime"), nb::arg("spans"), nb::arg("x"),
           nb::arg("cosine"), nb::arg("sine"), nb::arg("entries"), nb::arg("write_slots"),
           "x [T, H] += attention of its norm; writes kv.");
  nb::class_<FfnLayer>(m, "FfnLayer", "Norm, routers and experts; see decoder.h.")
      .def(nb::init<ConstArray, float, std::vector<PartObjects>>(), nb::arg("norm_weight"),
           nb::arg("norm_eps"), nb::arg("parts"))
      .def("count_into", &FfnLayer::count_into, nb::arg("rows"),
           "Every run leaves in rows [E] int32 how many rows of x chose each expert of the first "
           "part.")
      .def("run", &FfnLayer::run, nb::arg("runtime"), nb::arg("x"),
           "x [T, H] += the sum of all parts of its norm.");
  nb::class_<Head>(m, "Head", "Final norm and head; see decoder.h.")
      .def(
          "__init__",
          [](Head *self, ConstArray norm_weight, float norm_eps, nb::object matrix) {
            new (self) Head(std::move(norm_weight), norm_eps,
                            nb::cast<const PackedMatrix &>(matrix), matrix);
          },
          nb::arg("norm_weight"), nb::arg("norm_eps"), nb::arg("matrix"))
      .def("run", &Head::run, nb::arg("runtime"), nb::arg("x"), nb::arg("logits"),
           "logits [R, V] float32 of x [R, H].");
  m.def("turn_positions", &turn_positions, nb::arg("positions"), nb::arg("frequencies"),
        nb::arg("amplitude"), nb::arg("cosine"), nb::arg("sine"),
        "Fills cosine and sine [T, 1, 1, dim] of positions [T]; see turns.h.");
  nb::class_<KvLayers>(m, "KvLayers", "The kv entries of all layers; keeps the arrays alive.")
      .def(nb::init<const std::vector<nb::object> &>(), nb::arg("entries"));
  nb::class_<LayerStack>(m, "LayerStack", "Whole decoder layers, one after the other.")
      .def(nb::init<const std::vector<nb::object> &, Array>(), nb::arg("layers"),
           nb::arg("seconds"), "layers: (AttentionLayer, FfnLayer) each, or None.")
      .def("run", &LayerStack::run, nb::arg("runtime"), nb::arg("first"), nb::arg("stop"),
           nb::arg("x"), nb::arg("spans"), nb::arg("cosine"), nb::arg("sine"), nb::arg("kv"),
           nb::arg("write_slots"), "Layers first..stop - 1 on x [T, H].");
}

}  // namespace moeserve
