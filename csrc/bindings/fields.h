// What the bindings share: tuples of numbers (sizes and addresses) read front to back.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "../cpu/layer.h"

namespace fastrnn {

// Reads a tuple front to back; a wrong count is a mistake of the Python side.
class Fields {
 public:
  explicit Fields(const pybind11::tuple& t) : tuple_(t.ptr()), size_(PyTuple_GET_SIZE(t.ptr())) {}
  int64_t integer() {
    if (next_ >= size_) throw std::invalid_argument("fastrnn: too few fields in a tuple");
    const long long v = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple_, next_++));
    if (v == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return v;
  }
  double real() {
    if (next_ >= size_) throw std::invalid_argument("fastrnn: too few fields in a tuple");
    const double v = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple_, next_++));
    if (v == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return v;
  }
  bool at_end() const { return next_ == size_; }
  void* address() { return reinterpret_cast<void*>(static_cast<intptr_t>(integer())); }
  Grid strides() {
    Grid g;
    g.stride_t = integer();
    g.stride_n = integer();
    return g;
  }
  void end() const {
    if (next_ != size_) throw std::invalid_argument("fastrnn: too many fields in a tuple");
  }

 private:
  PyObject* tuple_;
  Py_ssize_t size_, next_ = 0;
};

}  // namespace fastrnn
