// Arguments of calls that run hundreds of times in a step. Importing a torch tensor by DLPack takes
// 4 us; asking it for its address, shape and strides takes a fifth of that. Anything else than a
// torch tensor (a numpy array) comes in by DLPack as everywhere.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstring>
#include <string>

namespace moeserve {

// A view that owns nothing: valid while the call's arguments are. Has the interface of nb::ndarray
// as far as the checks in bindings.h use it.
class Tensor {
 public:
  static constexpr std::size_t kMaxDims = 5;

  std::size_t ndim() const { return ndim_; }
  std::size_t shape(std::size_t i) const { return static_cast<std::size_t>(shape_[i]); }
  std::int64_t stride(std::size_t i) const { return stride_[i]; }
  nanobind::dlpack::dtype dtype() const { return dtype_; }
  const void *data() const { return data_; }
  // For results. Throws TypeError of Python, with the argument's name, for a read-only array.
  void *written(const char *name) const {
    if (!is_writable_) throw nanobind::type_error((std::string(name) + " is read-only").c_str());
    return data_;
  }

  // False, with a Python error set or not, where it is no tensor on the CPU that fits.
  bool read(nanobind::handle source) {
    const Names &names = Names::get();
    PyObject *type = reinterpret_cast<PyObject *>(Py_TYPE(source.ptr()));
    if (PyObject_HasAttr(type, names.data_ptr)) return read_torch(source, names);
    nanobind::ndarray<nanobind::ro, nanobind::device::cpu> array;
    if (!nanobind::try_cast(source, array) || array.ndim() > kMaxDims) return false;
    ndim_ = array.ndim();
    for (std::size_t i = 0; i < ndim_; ++i) {
      shape_[i] = static_cast<std::int64_t>(array.shape(i));
      stride_[i] = array.stride(i);
    }
    dtype_ = array.dtype();
    data_ = const_cast<void *>(array.data());
    nanobind::ndarray<nanobind::device::cpu> own;
    is_writable_ = nanobind::try_cast(source, own);
    if (!is_writable_) PyErr_Clear();
    return true;
  }

 private:
  // Strings are made once: making them takes as long as what they ask for.
  struct Names {
    PyObject *is_cpu = PyUnicode_InternFromString("is_cpu");
    PyObject *shape = PyUnicode_InternFromString("shape");
    PyObject *stride = PyUnicode_InternFromString("stride");
    PyObject *dtype = PyUnicode_InternFromString("dtype");
    PyObject *data_ptr = PyUnicode_InternFromString("data_ptr");
    static const Names &get() {
      static const Names names;
      return names;
    }
  };

  static nanobind::object attribute(nanobind::handle source, PyObject *name) {
    PyObject *value = PyObject_GetAttr(source.ptr(), name);
    if (value == nullptr) throw nanobind::python_error();
    return nanobind::steal(value);
  }

  static nanobind::object result(nanobind::handle source, PyObject *method) {
    PyObject *value = PyObject_CallMethodNoArgs(source.ptr(), method);
    if (value == nullptr) throw nanobind::python_error();
    return nanobind::steal(value);
  }

  bool read_torch(nanobind::handle source, const Names &names) {
    const nanobind::object on_cpu = attribute(source, names.is_cpu);
    if (!on_cpu.is(nanobind::handle(Py_True))) return false;
    const nanobind::object shape = attribute(source, names.shape);
    const nanobind::object stride = result(source, names.stride);
    ndim_ = nanobind::len(shape);
    if (ndim_ > kMaxDims) return false;
    for (std::size_t i = 0; i < ndim_; ++i) {
      shape_[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), static_cast<Py_ssize_t>(i)));
      stride_[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), static_cast<Py_ssize_t>(i)));
    }
    dtype_ = torch_dtype(attribute(source, names.dtype));
    const nanobind::object address = result(source, names.data_ptr);
    data_ = PyLong_AsVoidPtr(address.ptr());
    return !PyErr_Occurred();
  }

  // torch has one object for each of its types, for the life of the process.
  static nanobind::dlpack::dtype torch_dtype(nanobind::handle type) {
    struct Known {
      PyObject *object;
      nanobind::dlpack::dtype dtype;
    };
    static Known known[8];
    static int num_known = 0;
    for (int i = 0; i < num_known; ++i) {
      if (known[i].object == type.ptr()) return known[i].dtype;
    }
    const nanobind::str text = nanobind::str(type);
    const auto is = [&](const char *name) { return std::strcmp(text.c_str(), name) == 0; };
    const auto made = [](nanobind::dlpack::dtype_code code, int bits) {
      return nanobind::dlpack::dtype{static_cast<std::uint8_t>(code),
                                     static_cast<std::uint8_t>(bits), 1};
    };
    using Code = nanobind::dlpack::dtype_code;
    const nanobind::dlpack::dtype dtype = is("torch.float32")    ? made(Code::Float, 32)
                                          : is("torch.bfloat16") ? made(Code::Bfloat, 16)
                                          : is("torch.float16")  ? made(Code::Float, 16)
                                          : is("torch.int64")    ? made(Code::Int, 64)
                                          : is("torch.uint8")    ? made(Code::UInt, 8)
                                                                 : made(Code::Complex, 0);
    if (num_known < 8 && dtype.bits != 0) {
      known[num_known++] = {type.ptr(), dtype};
      Py_INCREF(type.ptr());
    }
    return dtype;
  }

  std::size_t ndim_ = 0;
  std::int64_t shape_[kMaxDims] = {};
  std::int64_t stride_[kMaxDims] = {};
  nanobind::dlpack::dtype dtype_ = {};
  void *data_ = nullptr;
  bool is_writable_ = true;
};

}  // namespace moeserve

template <>
struct nanobind::detail::type_caster<moeserve::Tensor> {
  NB_TYPE_CASTER(moeserve::Tensor, const_name("torch.Tensor"))

  bool from_python(handle source, std::uint8_t, cleanup_list *) noexcept {
    try {
      if (value.read(source)) return true;
    } catch (...) {  // a Python error of an object that is no tensor: no match
    }
    PyErr_Clear();
    return false;
  }
};
