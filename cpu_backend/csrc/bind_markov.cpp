// What prefetching asks in every layer, as Python calls it: `markov`, and what is likely and
// absent.
#include <nanobind/stl/vector.h>

#include <vector>

#include "bindings.h"
#include "likely_absent.h"
#include "markov_model.h"
#include "python_lock.h"

namespace nb = nanobind;

namespace moeserve {
namespace {

class Markov {
 public:
  Markov(std::vector<int> sizes, int depth, int num_context, std::vector<float> steps,
         float bias_step, float most_logit)
      : model_(checked(std::move(sizes), depth, num_context),
               {checked_steps(std::move(steps)), bias_step, most_logit}),
        outs_(static_cast<std::size_t>(model_.num_layers())) {}

  void set_out(int place, Array out) {
    check_place(place, model_.num_layers());
    check_dtype<float>(out, "out", "float32");
    check_size(out, "out", static_cast<std::size_t>(model_.num_outcomes(place)));
    check_contiguous(out, "out");
    model_.set_out(place, static_cast<float *>(out.data()));
    outs_[static_cast<std::size_t>(place)] = std::move(out);
  }

  void turn(const ConstArray &rows, const ConstArray &before, std::int64_t num_rows, int top_k) {
    if (num_rows < 0) refuse("num_rows", std::to_string(num_rows) + " is below 0");
    if (top_k < 1) refuse("top_k", std::to_string(top_k) + " is below 1");
    const std::int64_t *own = row_numbers(rows, "rows", num_rows);
    const std::int64_t *last = row_numbers(before, "before", model_.num_rows());
    check_size(before, "before", rows.shape(0));
    model_.turn(own, last, static_cast<std::int64_t>(rows.shape(0)), num_rows, top_k);
  }

  bool see(int place, const ConstArray &ids) {
    check_place(place, model_.num_layers());
    check_dtype<std::int64_t>(ids, "ids", "int64");
    check_contiguous(ids, "ids");
    check_rows(ids, "ids", model_.num_rows(), model_.top_k());
    const auto *numbers = static_cast<const std::int64_t *>(ids.data());
    for (std::int64_t i = 0; i < model_.num_rows() * model_.top_k(); ++i) {
      if (numbers[i] < 0 || numbers[i] >= model_.size_of(place)) {
        refuse("ids", std::to_string(numbers[i]) + " is not within 0.." +
                          std::to_string(model_.size_of(place) - 1));
      }
    }
    return model_.see(place, numbers);
  }

  void learn(Runtime &runtime) {
    const PythonLockGivenUp without(model_.rows_to_learn(), model_.row_bytes());
    model_.learn(runtime);
  }

  void say(Runtime &runtime, int place) {
    check_place(place, model_.num_layers());
    if (model_.num_rows() == 0) refuse("place", "no rows were seen there");
    if (!model_.has_out(place)) refuse("place", "call set_out first");
    const PythonLockGivenUp without(model_.num_rows(), model_.row_bytes());
    model_.say(runtime, place);
  }

  void forget() { model_.forget(); }

 private:
  static MarkovShape checked(std::vector<int> sizes, int depth, int num_context) {
    if (sizes.empty()) refuse("sizes", "there is no layer");
    for (const int size : sizes) {
      if (size < 1) refuse("sizes", std::to_string(size) + " is below 1");
    }
    const int count = static_cast<int>(sizes.size());
    if (depth < 1 || depth > count) {
      refuse("depth", std::to_string(depth) + "; 1 to " + std::to_string(count));
    }
    if (num_context < 1 || num_context > count) {
      refuse("num_context", std::to_string(num_context) + "; 1 to " + std::to_string(count));
    }
    return {std::move(sizes), depth, num_context};
  }

  static std::vector<float> checked_steps(std::vector<float> steps) {
    if (steps.size() < 2) refuse("steps", "must be at least two");
    return steps;
  }

  static const std::int64_t *row_numbers(const ConstArray &rows, const char *name,
                                         std::int64_t num_rows) {
    check_dtype<std::int64_t>(rows, name, "int64");
    check_contiguous(rows, name);
    if (rows.ndim() != 1) refuse(name, "must be one row of numbers");
    const auto *numbers = static_cast<const std::int64_t *>(rows.data());
    for (std::size_t i = 0; i < rows.shape(0); ++i) {
      if (numbers[i] < 0 || numbers[i] >= num_rows) {
        refuse(name, "row " + std::to_string(numbers[i]) + " of " + std::to_string(num_rows));
      }
    }
    return numbers;
  }

  MarkovModel model_;
  std::vector<Array> outs_;
};

nb::list find_likely_absent(const ConstArray &chances, const ConstArray &absent,
                            const std::vector<std::int64_t> &sizes) {
  std::int64_t count = 0;
  for (const std::int64_t size : sizes) {
    if (size < 1) refuse("sizes", std::to_string(size) + " is below 1");
    count += size;
  }
  const auto wanted = static_cast<std::size_t>(count);
  check_dtype<float>(chances, "chances", "float32");
  check_size(chances, "chances", wanted);
  check_contiguous(chances, "chances");
  check_dtype<bool>(absent, "absent", "bool");
  check_size(absent, "absent", wanted);
  check_contiguous(absent, "absent");
  nb::list found;
  for (const LikelyAbsent &each : likely_absent(static_cast<const float *>(chances.data()),
                                                static_cast<const bool *>(absent.data()), sizes)) {
    found.append(nb::make_tuple(each.layer, each.total, each.num_absent, nb::cast(each.experts),
                                nb::cast(each.chances)));
  }
  return found;
}

}  // namespace

void bind_markov(nb::module_ &m) {
  m.def("likely_absent", &find_likely_absent, nb::arg("chances"), nb::arg("absent"),
        nb::arg("sizes"), "See likely_absent.h: (layer, total, num_absent, experts, chances).");
  nb::class_<Markov>(m, "MarkovModel", "Experts follow experts; see markov_model.h.")
      .def(nb::init<std::vector<int>, int, int, std::vector<float>, float, float>(),
           nb::arg("sizes"), nb::arg("depth"), nb::arg("num_context"), nb::arg("steps"),
           nb::arg("bias_step"), nb::arg("most_logit"))
      .def("set_out", &Markov::set_out, nb::arg("place"), nb::arg("out"),
           "out: of all experts of the layers ahead of `place`, where results go.")
      .def("turn", &Markov::turn, nb::arg("rows"), nb::arg("before"), nb::arg("num_rows"),
           nb::arg("top_k"), "A step begins: rows[i] of it goes on from before[i] of the last.")
      .def("forget", &Markov::forget, "Nothing is to be learnt from what was said so far.")
      .def("see", &Markov::see, nb::arg("place"), nb::arg("ids"),
           "ids [T, K] were chosen. True where that is something to learn, once.")
      .def("learn", &Markov::learn, nb::arg("runtime"), "The oldest thing there is to learn.")
      .def("say", &Markov::say, nb::arg("runtime"), nb::arg("place"),
           "Fills the place's out: the chance that any row wants the expert.");
}

}  // namespace moeserve
