// Gate predictors as Python calls them.
#include <nanobind/stl/vector.h>

#include <vector>

#include "lookahead_predictor.h"
#include "packed_objects.h"
#include "python_lock.h"
#include "residual_predictor.h"

namespace nb = nanobind;

namespace moeserve {
namespace {

const Matrix &matrix_of(const nb::object &packed) {
  return nb::cast<const PackedMatrix &>(packed).matrix();
}

float *chances_of(const Array &out, int num_ahead, int num_experts) {
  check_dtype<float>(out, "out", "float32");
  check_contiguous(out, "out");
  check_rows(out, "out", num_ahead, num_experts);
  return static_cast<float *>(out.data());
}

// An array of float32 of exactly that shape.
const float *floats(const ConstArray &array, const char *name, std::vector<std::int64_t> shape) {
  check_dtype<float>(array, name, "float32");
  check_contiguous(array, name);
  bool fits = array.ndim() == shape.size();
  for (std::size_t i = 0; fits && i < shape.size(); ++i) {
    fits = static_cast<std::int64_t>(array.shape(i)) == shape[i];
  }
  if (!fits) refuse(name, "its shape " + shape_of(array) + " does not fit the others");
  return static_cast<const float *>(array.data());
}

RoutedRows rows_of(const Tensor &x, const Tensor &ids, int hidden, int num_experts) {
  RoutedRows rows = {};
  rows.dtype = float_dtype(x, "x");
  check_rows(x, "x", -1, hidden);
  rows.x = x.data();
  rows.num_rows = static_cast<std::int64_t>(x.shape(0));
  rows.x_stride = rows.num_rows > 1 ? x.stride(0) : 0;
  rows.top_k = check_choices(ids, rows.num_rows);
  rows.ids = static_cast<const std::int64_t *>(ids.data());
  for (std::int64_t i = 0; i < rows.num_rows * rows.top_k; ++i) {
    if (rows.ids[i] < 0 || rows.ids[i] >= num_experts) {
      refuse("ids",
             std::to_string(rows.ids[i]) + " is not within 0.." + std::to_string(num_experts - 1));
    }
  }
  return rows;
}

class Lookahead {
 public:
  Lookahead(int num_layers, int num_experts, int hidden, int top_k, float bins_per_unit,
            double half_life_tokens, double neighbour, double least_chance, int every_steps,
            std::vector<double> hits, std::vector<double> counts)
      : num_layers_(num_layers),
        num_experts_(num_experts),
        hidden_(hidden),
        predictor_(num_layers, num_experts, top_k,
                   {bins_per_unit, half_life_tokens, neighbour, least_chance, every_steps},
                   checked(hits, counts), counts) {
    if (num_layers < 1) refuse("num_layers", "must be at least 1");
    if (top_k < 1 || top_k > num_experts) {
      refuse("top_k", std::to_string(top_k) + "; 1 to " + std::to_string(num_experts));
    }
    if (every_steps < 1) refuse("every_steps", "must be at least 1");
  }

  void set_view(int place, nb::object gates, Array out) {
    check_place(place, num_layers_);
    const Matrix &matrix = matrix_of(gates);
    if (matrix.layout.cols != hidden_ || matrix.layout.rows % num_experts_ != 0) {
      refuse("gates", "their shape does not fit the predictor");
    }
    const int num_ahead = matrix.layout.rows / num_experts_;
    if (num_ahead > num_layers_ - 1 - place) refuse("gates", "they are more than layers ahead");
    predictor_.set_view(place, matrix, num_ahead, chances_of(out, num_ahead, num_experts_));
    held_.push_back(std::move(gates));
    outs_.push_back(std::move(out));
  }

  bool predict(Runtime &runtime, int place, const Tensor &x, const Tensor &ids) {
    check_place(place, num_layers_);
    const RoutedRows rows = rows_of(x, ids, hidden_, num_experts_);
    const PythonLockGivenUp without(predictor_.is_brief(place, rows.num_rows));
    return predictor_.predict(runtime, place, rows);
  }

 private:
  static std::vector<double> checked(const std::vector<double> &hits,
                                     const std::vector<double> &counts) {
    if (hits.empty() || hits.size() > 256 || hits.size() != counts.size()) {
      refuse("hits, counts", "must be equally many, 1 to 256");
    }
    return hits;
  }

  int num_layers_, num_experts_, hidden_;
  LookaheadPredictor predictor_;
  std::vector<nb::object> held_;
  std::vector<Array> outs_;
};

class Residual {
 public:
  Residual(int num_layers, int num_experts, int hidden)
      : num_layers_(num_layers),
        num_experts_(num_experts),
        hidden_(hidden),
        predictor_(num_layers, num_experts) {
    if (num_layers < 1) refuse("num_layers", "must be at least 1");
    if (num_experts < 1) refuse("num_experts", "must be at least 1");
  }

  void set_looking(int place, nb::object products, nb::object expert_in, int rank, int next_rank,
                   ConstArray bias, ConstArray chosen, ConstArray context_out,
                   ConstArray expert_out, Array out) {
    check_place(place, num_layers_);
    const Matrix &product = matrix_of(products), &units = matrix_of(expert_in);
    ResidualView view = {};
    view.num_ahead = out.ndim() == 2 ? static_cast<int>(out.shape(0)) : 0;
    view.outputs = product.layout.rows - 2 * rank - next_rank;
    view.rank = rank;
    view.next_rank = next_rank;
    check_rank("rank", rank);
    check_rank("next_rank", next_rank);
    check_rank("outputs", view.outputs);
    if (view.num_ahead < 1 || view.num_ahead > num_layers_ - 1 - place ||
        view.outputs < view.num_ahead * num_experts_) {
      refuse("out", "its layers do not fit products, or are more than layers ahead");
    }
    view.units = units.layout.rows / num_experts_;
    check_rank("units", view.units);
    const bool fits = units.layout.rows == view.units * num_experts_ && units.bias != nullptr &&
                      units.layout.has_panels_of(product.layout);
    if (!fits || view.units < 1) refuse("expert_in", "must have a bias and the format of products");
    check_product(product, units.layout.cols);
    const int both = view.outputs + rank;
    view.products = product;
    view.expert_in = units;
    view.bias = floats(bias, "bias", {both});
    view.chosen = floats(chosen, "chosen", {num_experts_, both});
    view.context_out = floats(context_out, "context_out", {rank, view.outputs});
    view.expert_out = floats(expert_out, "expert_out", {num_experts_, view.units, view.outputs});
    view.out = chances_of(out, view.num_ahead, num_experts_);
    predictor_.set_view(place, view);
    for (auto &each : {products, expert_in}) held_.push_back(each);
    for (auto *each : {&bias, &chosen, &context_out, &expert_out}) arrays_.push_back(*each);
    outs_.push_back(std::move(out));
  }

  void set_last(int place, nb::object products) {
    check_place(place, num_layers_);
    ResidualView view = {};
    view.products = matrix_of(products);
    view.next_rank = view.products.layout.rows;
    check_rank("products", view.next_rank);
    check_product(view.products, hidden_);
    predictor_.set_view(place, view);
    held_.push_back(std::move(products));
  }

  void begin_step(ConstArray previous_rows) {
    check_dtype<std::int64_t>(previous_rows, "previous_rows", "int64");
    check_contiguous(previous_rows, "previous_rows");
    if (previous_rows.ndim() != 1) refuse("previous_rows", "must be one row of numbers");
    predictor_.begin_step(static_cast<const std::int64_t *>(previous_rows.data()),
                          static_cast<std::int64_t>(previous_rows.shape(0)));
  }

  bool predict(Runtime &runtime, int place, const Tensor &x, const Tensor &ids,
               const Tensor &weights) {
    check_place(place, num_layers_);
    RoutedRows rows = rows_of(x, ids, hidden_, num_experts_);
    check_dtype<float>(weights, "weights", "float32");
    check_contiguous(weights, "weights");
    check_rows(weights, "weights", rows.num_rows, rows.top_k);
    rows.weights = static_cast<const float *>(weights.data());
    const PythonLockGivenUp without(predictor_.is_brief(place, rows));
    return predictor_.predict(runtime, place, rows);
  }

 private:
  static void check_rank(const char *name, int rank) {
    if (rank < 0 || rank % kPanelOutputs != 0) {
      refuse(name, std::to_string(rank) + " is no multiple of " + std::to_string(kPanelOutputs));
    }
  }

  void check_product(const Matrix &product, int cols) const {
    if (product.layout.cols != hidden_ || cols != hidden_) {
      refuse("products, expert_in", "their width is not " + std::to_string(hidden_));
    }
  }

  int num_layers_, num_experts_, hidden_;
  ResidualPredictor predictor_;
  std::vector<nb::object> held_;
  std::vector<ConstArray> arrays_;
  std::vector<Array> outs_;
};

}  // namespace

void bind_predictor(nb::module_ &m) {
  nb::class_<Lookahead>(m, "LookaheadPredictor", "Gates of the next layers; see predictor.h.")
      .def(nb::init<int, int, int, int, float, double, double, double, int, std::vector<double>,
                    std::vector<double>>(),
           nb::arg("num_layers"), nb::arg("num_experts"), nb::arg("hidden"), nb::arg("top_k"),
           nb::arg("bins_per_unit"), nb::arg("half_life_tokens"), nb::arg("neighbour"),
           nb::arg("least_chance"), nb::arg("every_steps"), nb::arg("hits"), nb::arg("counts"))
      .def("set_view", &Lookahead::set_view, nb::arg("place"), nb::arg("gates"), nb::arg("out"),
           "gates [D * E, H] of the D layers after `place`; out [D, E] is where results go.")
      .def("predict", &Lookahead::predict, nb::arg("runtime"), nb::arg("place"), nb::arg("x"),
           nb::arg("ids"),
           "Fills the view's out for x [T, H]; learns from ids [T, K]. False where nothing is "
           "said.");
  nb::class_<Residual>(m, "ResidualPredictor", "Trained views; see predictor.h.")
      .def(nb::init<int, int, int>(), nb::arg("num_layers"), nb::arg("num_experts"),
           nb::arg("hidden"))
      .def("set_looking", &Residual::set_looking, nb::arg("place"), nb::arg("products"),
           nb::arg("expert_in"), nb::arg("rank"), nb::arg("next_rank"), nb::arg("bias"),
           nb::arg("chosen"), nb::arg("context_out"), nb::arg("expert_out"), nb::arg("out"),
           "The view from a layer; out [D, E] is where results go.")
      .def("set_last", &Residual::set_last, nb::arg("place"), nb::arg("products"),
           "A layer that looks at nothing: products [R, H] for the layer before.")
      .def("begin_step", &Residual::begin_step, nb::arg("previous_rows"),
           "For every row of the step to come the row of the last one that it follows, or -1.")
      .def(
          "predict", &Residual::predict, nb::arg("runtime"), nb::arg("place"), nb::arg("x"),
          nb::arg("ids"), nb::arg("weights"),
          "Fills the view's out for x [T, H], of which the router chose ids, weights [T, K]. False "
          "where nothing is said.");
}

}  // namespace moeserve
