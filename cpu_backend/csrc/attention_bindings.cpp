// Attention and what stands before it, for Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <optional>
#include <vector>

#include "attention_arguments.h"
#include "bindings.h"
#include "python_lock.h"
#include "runtime.h"
#include "tensor.h"

namespace nb = nanobind;

namespace moeserve {

namespace {

void attend_spans(Runtime &runtime, const AttentionSpans &spans, const Tensor &queries,
                  const Tensor &entries, std::int64_t value_start, float scale, std::int64_t window,
                  const std::optional<Tensor> &sinks, const Tensor &out) {
  AttentionCall call = {};
  call.dtype = float_dtype(queries, "queries");
  check_dims(queries, "queries", 4);
  check_last_contiguous(queries, "queries");
  const std::int64_t num_rows = size(queries, 0), heads = size(queries, 1);
  const std::int64_t group = size(queries, 2), key_dim = size(queries, 3);
  if (num_rows != spans.num_rows()) {
    refuse("queries", std::to_string(num_rows) + " rows, but the spans have " +
                          std::to_string(spans.num_rows()));
  }
  check_dtype_as(entries, "entries", call.dtype, "queries");
  check_dims(entries, "entries", 3);
  check_contiguous(entries, "entries");
  const std::int64_t width = size(entries, 2);
  check_shape(entries, "entries", {size(entries, 0), heads, width});
  if (spans.num_slots() > size(entries, 0)) {
    refuse("spans", "slot " + std::to_string(spans.num_slots() - 1) + " is not within 0.." +
                        std::to_string(size(entries, 0) - 1));
  }
  check_dtype_as(out, "out", call.dtype, "queries");
  check_dims(out, "out", 4);
  check_shape(out, "out", {num_rows, heads, group, size(out, 3)});
  check_contiguous(out, "out");
  const std::int64_t value_dim = size(out, 3);
  if (key_dim > width) refuse("queries", "wider than a kv row of " + std::to_string(width));
  if (value_start < 0 || value_start + value_dim > width) {
    refuse("value_start", std::to_string(value_start) + " with " + std::to_string(value_dim) +
                              " numbers reaches beyond a kv row of " + std::to_string(width));
  }
  if (window < 0) refuse("window", std::to_string(window) + ", must not be negative");
  if (!std::isfinite(scale)) refuse("scale", "must be finite");
  call.num_kv_heads = static_cast<int>(heads);
  call.group_heads = static_cast<int>(group);
  call.key_dim = static_cast<int>(key_dim);
  call.value_start = static_cast<int>(value_start);
  call.value_dim = static_cast<int>(value_dim);
  call.width = static_cast<int>(width);
  call.window = window;
  call.scale = scale;
  call.queries = queries.data();
  for (std::size_t i = 0; i < 3; ++i) call.query_strides[i] = queries.stride(i);
  call.entries = entries.data();
  if (sinks) call.sinks = floats(*sinks, "sinks", {heads, group});
  call.out = out.written("out");
  const auto kv_bytes =
      static_cast<std::size_t>(spans.longest_context() * heads * width) * size_of(call.dtype);
  const PythonLockGivenUp without(num_rows, kv_bytes);
  if (num_rows > 0) attend(runtime, call, spans.spans());
}

void prepare_grouped(Runtime &runtime, const Tensor &qkv, const Tensor &cosine, const Tensor &sine,
                     const std::optional<Tensor> &norm_weight, bool norm_together, float norm_eps,
                     float clip, const Tensor &entries, const Tensor &write_slots) {
  GroupedHeads call = {};
  call.dtype = float_dtype(qkv, "qkv");
  check_dims(qkv, "qkv", 4);
  const std::int64_t num_rows = size(qkv, 0), heads = size(qkv, 1), dim = size(qkv, 3);
  const std::int64_t group = size(qkv, 2) - 2;
  if (group < 1) refuse("qkv", "shape " + shape_of(qkv) + ": no query heads");
  check_contiguous(qkv, "qkv");
  check_dtype_as(entries, "entries", call.dtype, "qkv");
  check_dims(entries, "entries", 3);
  check_shape(entries, "entries", {size(entries, 0), heads, 2 * dim});
  check_contiguous(entries, "entries");
  call.rows = qkv.written("qkv");
  call.row_stride = heads * (group + 2) * dim;
  call.num_kv_heads = static_cast<int>(heads);
  call.group_heads = static_cast<int>(group);
  call.head_dim = static_cast<int>(dim);
  call.turns = turns_of(cosine, sine, num_rows, dim);
  if (norm_weight) {
    const bool shared = norm_weight->ndim() == 3 && size(*norm_weight, 0) == 1;
    call.norm_weight = floats(*norm_weight, "norm_weight", {shared ? 1 : heads, group + 1, dim});
    call.norm_stride = shared ? 0 : (group + 1) * dim;
  }
  call.norm_together = norm_together;
  call.norm_eps = norm_eps;
  if (!(clip > 0)) refuse("clip", "must be positive; infinite for none");
  call.clip = clip;
  call.entries = entries.written("entries");
  call.slots = slots(write_slots, "write_slots", num_rows, size(entries, 0));
  const auto row_bytes = static_cast<std::size_t>(call.row_stride) * size_of(call.dtype);
  const PythonLockGivenUp without(num_rows, row_bytes);
  prepare(runtime, call, num_rows);
}

void prepare_latent(Runtime &runtime, const Tensor &latents, const Tensor &rotated,
                    const Tensor &cosine, const Tensor &sine, const Tensor &norm_weight,
                    float norm_eps, const Tensor &entries, const Tensor &write_slots) {
  LatentHeads call = {};
  call.dtype = float_dtype(latents, "latents");
  check_dims(latents, "latents", 2);
  const std::int64_t num_rows = size(latents, 0), width = size(latents, 1);
  check_dtype_as(rotated, "rotated", call.dtype, "latents");
  check_dims(rotated, "rotated", 3);
  check_last_contiguous(rotated, "rotated");
  call.turns = turns_of(cosine, sine, num_rows, size(rotated, 2));
  check_shape(rotated, "rotated", {num_rows, size(rotated, 1), call.turns.dim});
  const std::int64_t rank = width - call.turns.dim;
  if (rank < 1) refuse("latents", "shape " + shape_of(latents) + ": nothing but rotated numbers");
  check_contiguous(latents, "latents");
  check_dtype_as(entries, "entries", call.dtype, "latents");
  check_dims(entries, "entries", 3);
  check_shape(entries, "entries", {size(entries, 0), 1, width});
  check_contiguous(entries, "entries");
  call.latents = latents.data();
  call.latent_stride = width;
  call.rank = static_cast<int>(rank);
  call.rotated = rotated.written("rotated");
  for (std::size_t i = 0; i < 2; ++i) call.rotated_strides[i] = rotated.stride(i);
  call.num_heads = static_cast<int>(size(rotated, 1));
  call.norm_weight = floats(norm_weight, "norm_weight", {rank});
  call.norm_eps = norm_eps;
  call.entries = entries.written("entries");
  call.slots = slots(write_slots, "write_slots", num_rows, size(entries, 0));
  const auto row_bytes =
      static_cast<std::size_t>(width + size(rotated, 1) * call.turns.dim) * size_of(call.dtype);
  const PythonLockGivenUp without(num_rows, row_bytes);
  prepare(runtime, call, num_rows);
}

}  // namespace

void bind_attention(nb::module_ &m) {
  nb::class_<AttentionSpans>(m, "AttentionSpans", "The rows of a step, sequence by sequence.")
      .def(nb::init<const std::vector<AttentionSpans::Item> &>(), nb::arg("spans"),
           "spans: (first row, number of rows, context tokens with these rows, kv slots of the "
           "context as int64), in order and without gaps. Raises ValueError.")
      .def_prop_ro("num_rows", &AttentionSpans::num_rows);
  m.def("attend", &attend_spans, nb::arg("runtime"), nb::arg("spans"), nb::arg("queries"),
        nb::arg("entries"), nb::arg("value_start"), nb::arg("scale"), nb::arg("window"),
        nb::arg("sinks").none(), nb::arg("out"),
        "Causal attention: queries [T, kv_heads, G, D] over entries [slots, kv_heads, width] to "
        "out [T, kv_heads, G, value width]. window: keys that a query sees, 0 for all. sinks: "
        "[kv_heads, G] float32 or None. Raises ValueError.");
  m.def("prepare_grouped", &prepare_grouped, nb::arg("runtime"), nb::arg("qkv"), nb::arg("cosine"),
        nb::arg("sine"), nb::arg("norm_weight").none(), nb::arg("norm_together"),
        nb::arg("norm_eps"), nb::arg("clip"), nb::arg("entries"), nb::arg("write_slots"),
        "qkv [T, kv_heads, G + 2, D]: norms queries and keys, clips all, turns queries and keys; "
        "queries stay, keys and values go to entries. Raises ValueError.");
  m.def("prepare_latent", &prepare_latent, nb::arg("runtime"), nb::arg("latents"),
        nb::arg("rotated"), nb::arg("cosine"), nb::arg("sine"), nb::arg("norm_weight"),
        nb::arg("norm_eps"), nb::arg("entries"), nb::arg("write_slots"),
        "latents [T, rank + dim] to entries, the first rank numbers normed, the others turned; "
        "rotated [T, heads, dim] turned in place. Raises ValueError.");
}

}  // namespace moeserve
