// Tensors that are asked for their own addresses, through Python's attributes, since nothing of torch is linked, and
// calls whose numbers are read once.
#pragma once
#include <array>
#include <cstring>
#include <initializer_list>
#include <memory>

#include "../cpu/team.h"
#include "args.h"
#include "large_memory.h"

namespace fastrnn {

namespace py = pybind11;

using Arguments = PyObject* const*;

struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* version = PyUnicode_InternFromString("_version");
};

inline const Names& names() {
  static const Names* const all = new Names;  // never freed: Python may be gone by then
  return *all;
}

inline py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline py::object attribute(PyObject* of, PyObject* name) { return checked(PyObject_GetAttr(of, name)); }
inline py::object method(PyObject* of, PyObject* name) {
  return checked(PyObject_CallMethodNoArgs(of, name));
}

// Of a tensor, an integer, or None for nothing.
inline void* address(PyObject* of) {
  if (of == Py_None) return nullptr;
  py::object held;
  if (!PyLong_Check(of)) {
    held = method(of, names().data_ptr);
    of = held.ptr();
  }
  void* at = PyLong_AsVoidPtr(of);
  if (!at && PyErr_Occurred()) throw py::error_already_set();
  return at;
}

// An exception of C++ as one of Python, for functions that pybind11 does not wrap.
template <typename Body>
PyObject* guarded(Py_ssize_t given, Py_ssize_t wanted, Body body) {
  if (given != wanted)
    return PyErr_Format(PyExc_TypeError, "fastrnn: got %zd arguments, expected %zd", given, wanted);
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
  return nullptr;
}

// A call as Python describes it once, and the scratch that it needs, by which of its tensors there are.
template <typename Args>
struct Described {
  Args args;
  std::array<size_t, 256> workspace{};
};

// Products of a direction's matrices with its rows, up to which a call takes less time than other threads of Python need
// to come in: it keeps the lock.
constexpr int64_t kBrief = 1 << 15;

template <typename Body>
void run_call(bool brief, Body body) {
  if (brief) return body();
  py::gil_scoped_release release;
  body();
}

constexpr const char* kind(const ForwardArgs&) { return "fastrnn.forward"; }
constexpr const char* kind(const BackwardArgs&) { return "fastrnn.backward"; }

template <typename Args>
py::capsule described(const Args& args) {
  return py::capsule(new Described<Args>{args}, kind(args), [](PyObject* capsule) {
    delete static_cast<Described<Args>*>(PyCapsule_GetPointer(capsule, kind(Args())));
  });
}

template <typename Args>
Described<Args>& description(PyObject* capsule) {
  void* const at = PyCapsule_GetPointer(capsule, kind(Args()));
  if (!at) throw py::error_already_set();
  return *static_cast<Described<Args>*>(at);
}

inline unsigned present(std::initializer_list<const void*> tensors) {
  unsigned bits = 0;
  for (const void* each : tensors) bits = bits * 2 + (each != nullptr);
  return bits;
}

// Scratch of this thread, kept while it lives if it is small: less where a backward follows, beside whose
// tensors it would lie. Large scratch comes from what the process keeps.
class Scratch {
 public:
  Scratch(size_t bytes, bool records) {
    struct Kept {
      std::unique_ptr<char[]> data;
      size_t bytes = 0;
    };
    thread_local Kept kept;
    char* from = kept.data.get();
    if (bytes > (records ? kKept / 4 : kKept)) {
      large_ = LargeMemory::get().take(bytes + kLine);
      if (!large_) own_.reset(new char[bytes + kLine]);
      from = large_ ? static_cast<char*>(large_) : own_.get();
    } else if (bytes > kept.bytes) {
      kept = {};
      kept.data.reset(from = new char[bytes + kLine]);
      kept.bytes = bytes;
    }
    at_ = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(from) + kLine - 1) / kLine * kLine);
  }
  ~Scratch() {
    if (large_) LargeMemory::get().give(large_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return at_; }

 private:
  static constexpr size_t kKept = size_t{1} << 20, kLine = 64;
  std::unique_ptr<char[]> own_;
  void* large_ = nullptr;
  void* at_;
};

// Addresses of a layer's parameters in torch's order, as fastrnn/backends/cpu.py's _addresses has them.
template <typename Into>
void read_parameters(PyObject* tensors, const Problem& p, Into* into) {
  const auto all = checked(PySequence_Fast(tensors, "weights: expected a sequence"));
  const Py_ssize_t per = PySequence_Fast_GET_SIZE(all.ptr()) / p.directions;
  const Py_ssize_t norms = !normalises(p.cell) ? 0 : p.cell == Cell::lstm_layer_norm ? 4 : 2;
  const Py_ssize_t plain = per - norms;
  for (int d = 0; d < p.directions; d++) {
    const auto at = [&](Py_ssize_t i) { return address(PySequence_Fast_GET_ITEM(all.ptr(), d * per + i)); };
    into[d].w_ih = at(0);
    into[d].w_hh = at(1);
    into[d].b_ih = plain >= 4 ? at(2) : nullptr;
    into[d].b_hh = plain >= 4 ? at(3) : nullptr;
    into[d].w_hr = plain % 2 ? at(plain - 1) : nullptr;
    if (!norms) continue;
    into[d].ln_ih = at(plain);
    into[d].ln_hh = at(plain + 1);
    into[d].ln_c = norms == 4 ? at(plain + 2) : nullptr;
    into[d].ln_bias_c = norms == 4 ? at(plain + 3) : nullptr;
  }
}

template <typename Function>
PyMethodDef fast(const char* name, Function* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
}

}  // namespace fastrnn
