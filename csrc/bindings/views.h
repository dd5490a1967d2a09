// Tensors as a call meets them: what they are, and how new ones are made, without a line of torch linked.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "dlpack.h"
#include "tensors.h"

namespace fastrnn {

// The table of functions by which a type gives DLPack's view of it, from torch 2.10 on: one call instead of six attributes.
// The standard's names; only what is used here.
struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  void *previous, *allocate, *from_object, *to_object;
  int (*dltensor_from_object)(void* object, DLTensor* out);
};

// What Python hands over once: the dtypes that there are, torch's allocator and number of threads. Held for good, as
// Python may be gone when statics are destroyed.
struct Torch {
  PyObject *dtypes = nullptr, *empty = nullptr, *threads = nullptr;
  int (*dltensor)(void*, DLTensor*) = nullptr;
};
inline Torch& torch_api() {
  static Torch all;
  return all;
}
inline long torch_threads() { return PyLong_AsLong(checked(PyObject_CallNoArgs(torch_api().threads)).ptr()); }

// A tensor to allocate: shape, strides and dtype, as the allocator takes them.
using Layout = std::array<py::object, 3>;

inline Layout layout(const py::handle& from) {
  const auto t = py::reinterpret_borrow<py::tuple>(from);
  return {t[0], t[1], t[2]};
}
inline py::object empty(const Layout& like) {
  PyObject* const args[] = {like[0].ptr(), like[1].ptr(), like[2].ptr()};
  return checked(PyObject_Vectorcall(torch_api().empty, args, 3, nullptr));
}

// What a call needs to know of a tensor.
struct View {
  void* data = nullptr;
  int dtype = -1;  // bits, more by kBrain for bfloat16
  bool given = false, cpu = false, dense = false;
  Py_ssize_t dims = 0;
  std::array<int64_t, 3> shape{-1, -1, -1};
  static constexpr int kBrain = 1000;

  bool like(int other, const std::array<int64_t, 3>& sizes) const {
    return given && cpu && dense && dtype == other && shape == sizes;
  }

  explicit View(PyObject* tensor) {
    given = tensor != Py_None;
    if (!given) return;
    try {
      torch_api().dltensor ? of_dlpack(tensor) : of_attributes(tensor);
    } catch (const py::error_already_set&) {
      data = nullptr, dense = false;  // as in of_dlpack()
    }
  }

 private:
  void of_dlpack(PyObject* tensor) {
    DLTensor t;
    if (torch_api().dltensor(tensor, &t)) {  // not a dense tensor with memory: torch's to deal with
      PyErr_Clear();
      return;
    }
    data = static_cast<char*>(t.data) + t.byte_offset;
    cpu = t.device.type == 1;
    dtype = t.dtype.code == 2 ? t.dtype.bits : t.dtype.code == 4 ? kBrain + t.dtype.bits : -1;
    dims = t.ndim;
    dense = dims <= 3;
    int64_t expected = 1;
    for (int i = std::min(t.ndim, 3) - 1; i >= 0; i--) {
      shape[i] = t.shape[i];
      dense &= t.shape[i] == 1 || t.strides[i] == expected;
      expected *= t.shape[i];
    }
  }

  void of_attributes(PyObject* tensor) {
    const Names& n = names();
    const auto sizes = attribute(tensor, n.shape), type = attribute(tensor, n.dtype);
    dims = PyTuple_GET_SIZE(sizes.ptr());
    for (Py_ssize_t i = 0; i < std::min<Py_ssize_t>(dims, 3); i++)
      shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i));
    const int known[] = {32, 64, kBrain + 16};
    for (int i = 0; i < 3; i++)
      if (PyTuple_GET_ITEM(torch_api().dtypes, i) == type.ptr()) dtype = known[i];
    cpu = attribute(tensor, n.is_cpu).ptr() == Py_True;
    dense = cpu && dims <= 3 && method(tensor, n.is_contiguous).ptr() == Py_True;
    if (cpu) data = address(tensor);
  }
};

}  // namespace fastrnn
