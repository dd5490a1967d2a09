// Small calls, for which reading a tuple of numbers takes as long as the layer: descriptions that are read
// once and tensors that are asked for their own addresses, through Python's attributes, since nothing of
// torch is linked.
#include <array>
#include <cstring>
#include <initializer_list>
#include <memory>

#include "../cpu/pages.h"
#include "../cpu/team.h"
#include "args.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

using Arguments = PyObject* const*;

struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* is_nested = PyUnicode_InternFromString("is_nested");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* version = PyUnicode_InternFromString("_version");
};

const Names& names() {
  static const Names* const all = new Names;  // never freed: Python may be gone by then
  return *all;
}

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object attribute(PyObject* of, PyObject* name) { return checked(PyObject_GetAttr(of, name)); }
py::object method(PyObject* of, PyObject* name) { return checked(PyObject_CallMethodNoArgs(of, name)); }

// Of a tensor, an integer, or None for nothing.
void* address(PyObject* of) {
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

// alike(tensor, types, shape, dtype): whether it is exactly of one of these types, and dense on the CPU.
PyObject* alike(PyObject*, Arguments a, Py_ssize_t count) {
  return guarded(count, 4, [&]() -> PyObject* {
    PyObject* const tensor = a[0];
    bool known = false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a[1]); i++)
      known |= reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == PyTuple_GET_ITEM(a[1], i);
    if (!known) Py_RETURN_FALSE;
    const Names& n = names();
    if (attribute(tensor, n.is_nested).ptr() != Py_False) Py_RETURN_FALSE;  // which has no shape
    const int same = PyObject_RichCompareBool(attribute(tensor, n.shape).ptr(), a[2], Py_EQ);
    if (same < 0) throw py::error_already_set();
    return PyBool_FromLong(
        same && attribute(tensor, n.dtype).ptr() == a[3] && attribute(tensor, n.is_cpu).ptr() == Py_True &&
        method(tensor, n.is_contiguous).ptr() == Py_True &&
        method(tensor, n.is_neg).ptr() == Py_False);  // a lazy sign is torch's to carry out
  });
}

// unchanged(weights, refs, stamps, samples, values): fastrnn/nn/cache.py says what they are.
PyObject* unchanged(PyObject*, Arguments a, Py_ssize_t count) {
  return guarded(count, 5, [&]() -> PyObject* {
    const Names& n = names();
    const auto weights = checked(PySequence_Fast(a[0], "weights: expected a sequence"));
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(weights.ptr());
    if (size != PyTuple_GET_SIZE(a[1])) Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i < size; i++) {
      PyObject* const weight = PySequence_Fast_GET_ITEM(weights.ptr(), i);
      PyObject* const stamp = PyTuple_GET_ITEM(a[2], i);
      if (checked(PyObject_CallNoArgs(PyTuple_GET_ITEM(a[1], i))).ptr() != weight) Py_RETURN_FALSE;
      if (address(weight) != address(PyTuple_GET_ITEM(stamp, 0))) Py_RETURN_FALSE;
      const auto version = attribute(weight, n.version);
      if (PyLong_AsLongLong(version.ptr()) != PyLong_AsLongLong(PyTuple_GET_ITEM(stamp, 1))) Py_RETURN_FALSE;
      if (method(weight, n.is_contiguous).ptr() != Py_True) Py_RETURN_FALSE;
    }
    // After the loop, which has shown that the addresses still belong to the weights.
    const char *addresses = PyBytes_AS_STRING(a[3]), *values = PyBytes_AS_STRING(a[4]);
    const Py_ssize_t bytes = PyBytes_GET_SIZE(a[3]);
    if (bytes != PyBytes_GET_SIZE(a[4])) Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i + 8 <= bytes; i += 8) {
      uint64_t at;
      std::memcpy(&at, addresses + i, 8);
      if (std::memcmp(reinterpret_cast<const void*>(static_cast<uintptr_t>(at)), values + i, 8))
        Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
  });
}

// A call as Python describes it once, and the scratch that it needs, by which of its tensors there are.
template <typename Args>
struct Described {
  Args args;
  std::array<size_t, 256> workspace{};
};

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

unsigned present(std::initializer_list<const void*> tensors) {
  unsigned bits = 0;
  for (const void* each : tensors) bits = bits * 2 + (each != nullptr);
  return bits;
}

// Scratch of this thread, kept while it lives if it is small: less where a backward follows, beside whose
// tensors it would lie.
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
      own_.reset(new char[bytes + kLine]);
      from = own_.get();
      prefer_huge_pages(from, bytes);
    } else if (bytes > kept.bytes) {
      kept = {};
      kept.data.reset(from = new char[bytes + kLine]);
      kept.bytes = bytes;
    }
    at_ = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(from) + kLine - 1) / kLine * kLine);
  }
  void* get() const { return at_; }

 private:
  static constexpr size_t kKept = size_t{1} << 20, kLine = 64;
  std::unique_ptr<char[]> own_;
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

// run_forward(description, x, y, cells, h0, c0, h_n, c_n, gates, weights): None keeps the description's
// weights, and stands for tensors that a call does not have.
PyObject* run_forward(PyObject*, Arguments given, Py_ssize_t count) {
  return guarded(count, 10, [&]() -> PyObject* {
    auto& known = description<ForwardArgs>(given[0]);
    ForwardArgs a = known.args;
    a.x.data = address(given[1]);
    a.y.data = address(given[2]);
    a.cells.data = address(given[3]);
    a.h0 = address(given[4]);
    a.c0 = address(given[5]);
    a.h_n = address(given[6]);
    a.c_n = address(given[7]);
    a.gates = address(given[8]);
    if (given[9] != Py_None) read_parameters(given[9], a, a.weights);
    size_t& bytes = known.workspace[present({a.cells.data, a.gates})];
    if (!bytes) bytes = kernels().forward_workspace(a) + 1;
    const Scratch scratch(bytes, given[9] != Py_None);
    a.workspace = scratch.get();
    {
      py::gil_scoped_release release;
      kernels().forward(a);
    }
    Py_RETURN_NONE;
  });
}

// run_backward(description, x, y, cells, dx, dy, dcells, h0, c0, dh_n, dc_n, dh0, dc0, gates, weights,
// dweights): None in the place of dweights if they are not wanted.
PyObject* run_backward(PyObject*, Arguments given, Py_ssize_t count) {
  return guarded(count, 16, [&]() -> PyObject* {
    auto& known = description<BackwardArgs>(given[0]);
    BackwardArgs a = known.args;
    a.x.data = address(given[1]);
    a.y.data = address(given[2]);
    a.cells.data = address(given[3]);
    a.dx.data = address(given[4]);
    a.dy.data = address(given[5]);
    a.dcells.data = address(given[6]);
    a.h0 = address(given[7]);
    a.c0 = address(given[8]);
    a.dh_n = address(given[9]);
    a.dc_n = address(given[10]);
    a.dh0 = address(given[11]);
    a.dc0 = address(given[12]);
    a.gates = address(given[13]);
    read_parameters(given[14], a, a.weights);
    a.want_weights = given[15] != Py_None;
    if (a.want_weights) read_parameters(given[15], a, a.grads);
    const void* const wanted = a.want_weights ? &a : nullptr;
    size_t& bytes =
        known.workspace[present({a.dx.data, a.dy.data, a.dcells.data, a.dh_n, a.dc_n, a.dh0, a.dc0, wanted})];
    if (!bytes) bytes = kernels().backward_workspace(a) + 1;
    const Scratch scratch(bytes, true);
    a.workspace = scratch.get();
    {
      py::gil_scoped_release release;
      kernels().backward(a);
    }
    Py_RETURN_NONE;
  });
}

template <typename Function>
PyMethodDef fast(const char* name, Function* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
}

}  // namespace

void bind_tensors(py::module_& m) {
  m.def("describe_forward", [](const py::tuple& problem, const py::tuple& tensors) {
    return described(forward_args(problem, tensors));
  });
  m.def("describe_backward", [](const py::tuple& problem, const py::tuple& tensors) {
    return described(backward_args(problem, tensors));
  });
  static PyMethodDef functions[] = {fast("alike", alike),
                                    fast("unchanged", unchanged),
                                    fast("run_forward", run_forward),
                                    fast("run_backward", run_backward),
                                    {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), functions) < 0) throw py::error_already_set();
}

}  // namespace fastrnn
