// Small calls, for which reading a tuple of numbers takes as long as the layer: descriptions that are read
// once and tensors that are asked for their own addresses.
#include "tensors.h"

namespace fastrnn {
namespace {

bool is_alike(PyObject* tensor, PyObject* types, PyObject* shape, PyObject* dtype) {
  bool known = false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); i++)
    known |= reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == PyTuple_GET_ITEM(types, i);
  if (!known) return false;
  const Names& n = names();
  try {
    method(tensor, n.data_ptr);
    const int same = PyObject_RichCompareBool(attribute(tensor, n.shape).ptr(), shape, Py_EQ);
    if (same < 0) throw py::error_already_set();
    return same && attribute(tensor, n.dtype).ptr() == dtype &&
           attribute(tensor, n.is_cpu).ptr() == Py_True && method(tensor, n.is_contiguous).ptr() == Py_True &&
           method(tensor, n.is_neg).ptr() == Py_False;  // a lazy sign is torch's to carry out
  } catch (
      const py::error_already_set&) {  // a nested tensor has no shape, others have no memory of their own
    return false;
  }
}

// alike(tensor, types, shape, dtype): whether it is exactly of one of these types, and dense on the CPU.
PyObject* alike(PyObject*, Arguments a, Py_ssize_t count) {
  return guarded(count, 4, [&]() -> PyObject* { return PyBool_FromLong(is_alike(a[0], a[1], a[2], a[3])); });
}

// all_alike(tensors, types, layouts): whether each is alike; `layouts` are pairs of a shape and a dtype.
PyObject* all_alike(PyObject*, Arguments a, Py_ssize_t count) {
  return guarded(count, 3, [&]() -> PyObject* {
    const auto tensors = checked(PySequence_Fast(a[0], "tensors: expected a sequence"));
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(tensors.ptr());
    bool all = size == PyTuple_GET_SIZE(a[2]);
    for (Py_ssize_t i = 0; all && i < size; i++) {
      PyObject* const layout = PyTuple_GET_ITEM(a[2], i);
      all = is_alike(PySequence_Fast_GET_ITEM(tensors.ptr(), i), a[1], PyTuple_GET_ITEM(layout, 0),
                     PyTuple_GET_ITEM(layout, 1));
    }
    return PyBool_FromLong(all);
  });
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

}  // namespace

void bind_tensors(py::module_& m) {
  m.def("describe_forward", [](const py::tuple& problem, const py::tuple& tensors) {
    return described(forward_args(problem, tensors));
  });
  m.def("describe_backward", [](const py::tuple& problem, const py::tuple& tensors) {
    return described(backward_args(problem, tensors));
  });
  static PyMethodDef functions[] = {fast("alike", alike),
                                    fast("all_alike", all_alike),
                                    fast("run_forward", run_forward),
                                    fast("run_backward", run_backward),
                                    {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), functions) < 0) throw py::error_already_set();
}

}  // namespace fastrnn
