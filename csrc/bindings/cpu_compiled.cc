// The operators that compiled code calls for plain layers (fastrnn/ops/plain.py), as functions of C: a kind of call is
// described by Python at its first, and recognised here at every later one.
#include "views.h"

namespace fastrnn {
namespace {

// What Python hands over once: its own functions for every call that is not recognised. Held for good, as Python may be
// gone when statics are destroyed.
struct Python {
  PyObject *forward = nullptr, *train = nullptr, *backward = nullptr, *into = nullptr;
} python;

using Views = std::vector<View>;

struct Kind {
  py::object cell;
  std::array<int64_t, 3> x_shape, w_hh_shape;
  int dtype;
  size_t weights, directions;
  bool batch_first;
  long threads;
  const Kernels* kernels;
  Described<ForwardArgs> forward;
  Described<BackwardArgs> backward;
  Layout x, y, state;                    // h_n and c_n have one shape: there is no projection
  std::vector<Layout> tape, parameters;  // cells and gates, what the cell has of them; all weights
  std::vector<char> zeros;               // states that are not given
  bool brief;
};

using Known = std::vector<std::shared_ptr<Kind>>;
constexpr size_t kKinds = 32;

Known& known() {
  static Known* const all = new Known;
  return *all;
}

bool equal(PyObject* a, PyObject* b) {
  if (a == b) return true;
  const int same = PyObject_RichCompareBool(a, b, Py_EQ);
  if (same < 0) throw py::error_already_set();
  return same;
}

Views views(PyObject* list) {
  if (!PyList_Check(list)) throw std::invalid_argument("fastrnn: expected a list of tensors");
  Views all;
  all.reserve(PyList_GET_SIZE(list));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) all.emplace_back(PyList_GET_ITEM(list, i));
  return all;
}

bool all_dense(const Views& tensors) {
  for (const View& each : tensors)
    if (!each.dense || !each.cpu) return false;
  return true;
}

// The kind of a call with so many weights of so many directions, of which `matrices` has w_ih and w_hh first;
// null: ask Python.
std::shared_ptr<Kind> find(const View& x, const Views& matrices, size_t weights, size_t directions,
                           PyObject* cell, PyObject* batch_first) {
  if (matrices.size() < 2 || !torch_api().empty) return nullptr;
  const long threads = torch_threads();
  const Kernels* const current = &kernels();
  const bool first = batch_first == Py_True;
  for (const auto& kind : known())
    if (kind->weights == weights && kind->directions == directions && kind->batch_first == first &&
        kind->threads == threads && kind->kernels == current && kind->dtype == x.dtype &&
        kind->x_shape == x.shape && kind->w_hh_shape == matrices[1].shape && equal(kind->cell.ptr(), cell))
      return kind;
  return nullptr;
}

// A call that is not made here, and whether its kind is known.
PyObject* ask(PyObject* function, Arguments given, size_t count, bool recognised) {
  if (!function) throw std::invalid_argument("fastrnn: plain_setup was not called");
  std::vector<PyObject*> args(given, given + count);
  args.push_back(recognised ? Py_True : Py_False);
  return PyObject_Vectorcall(function, args.data(), args.size(), nullptr);
}

void* add(const py::object& results, const Layout& like) {
  const auto tensor = empty(like);
  if (PyList_Append(results.ptr(), tensor.ptr())) throw py::error_already_set();
  return View(tensor.ptr()).data;
}

const void* state(const Views& states, size_t i, Kind& kind) {
  return states.empty() ? kind.zeros.data() : states[i].data;
}

bool states_fit(const Views& states, const Kind& kind) {
  const size_t wanted = is_lstm(kind.forward.args.cell) ? 2 : 1;
  return (states.empty() || states.size() == wanted) && all_dense(states);
}

bool results_fit(const View& x, const View& y, const View& h_n, const View& c_n, const Kind& kind) {
  const int64_t directions = static_cast<int64_t>(kind.directions), hidden = kind.w_hh_shape[1];
  const std::array<int64_t, 3> state{directions, x.shape[kind.batch_first ? 0 : 1], hidden};
  const bool lstm = is_lstm(kind.forward.args.cell);
  return y.like(kind.dtype, {x.shape[0], x.shape[1], directions * hidden}) && h_n.like(kind.dtype, state) &&
         (lstm ? c_n.like(kind.dtype, state) : !c_n.given);
}

// The weights of a layer, of which no biases may be there.
void use(const Views& weights, ForwardArgs& a) {
  const size_t per = weights.size() / a.directions;
  for (int d = 0; d < a.directions; d++) {
    const View* const own = &weights[d * per];
    a.weights[d].w_ih = own[0].data;
    a.weights[d].w_hh = own[1].data;
    if (per == 4) a.weights[d].b_ih = own[2].data;
    if (per == 4) a.weights[d].b_hh = own[3].data;
  }
}

// Results are made, made with what a backward needs, or given to be filled.
enum class Results { made, taped, given };

// forward(x, states, weights, cell, batch_first): [y, h_n] and, where the cell has them, c_n; for a backward cells
// and gates too. Where they are given, y, h_n and c_n follow, and the result is None.
template <Results kResults>
PyObject* forward(PyObject*, Arguments given, Py_ssize_t count) {
  constexpr bool kRecords = kResults == Results::taped, kInto = kResults == Results::given;
  constexpr Py_ssize_t kCount = kInto ? 8 : 5;
  return guarded(count, kCount, [&]() -> PyObject* {
    const View x(given[0]);
    const Views states = views(given[1]), weights = views(given[2]);
    const bool bias = weights.size() > 2 && weights[2].shape[1] < 0;  // which has one dimension
    const auto kind = find(x, weights, weights.size(), weights.size() / (bias ? 4 : 2), given[3], given[4]);
    const View y(kInto ? given[5] : Py_None), h_n(kInto ? given[6] : Py_None),
        c_n(kInto ? given[7] : Py_None);
    if (!kind || !x.cpu || !x.dense || !states_fit(states, *kind) || !all_dense(weights) ||
        (kInto && !results_fit(x, y, h_n, c_n, *kind)))
      return ask(kInto      ? python.into
                 : kRecords ? python.train
                            : python.forward,
                 given, kCount, kind != nullptr);
    ForwardArgs a = kind->forward.args;
    const bool lstm = is_lstm(a.cell);
    py::object results = kInto ? py::object(py::none()) : py::list();
    a.x.data = x.data;
    a.y.data = kInto ? y.data : add(results, kind->y);
    a.h_n = kInto ? h_n.data : add(results, kind->state);
    if (lstm) a.c_n = kInto ? c_n.data : add(results, kind->state);
    if (kRecords) {
      size_t next = 0;
      if (lstm) a.cells.data = add(results, kind->tape[next++]);
      if (next < kind->tape.size()) a.gates = add(results, kind->tape[next]);
    }
    a.h0 = state(states, 0, *kind);
    if (lstm) a.c0 = state(states, 1, *kind);
    use(weights, a);
    size_t& bytes = kind->forward.workspace[present({a.cells.data, a.gates})];
    if (!bytes) bytes = kernels().forward_workspace(a) + 1;
    const Scratch scratch(bytes, kRecords);
    a.workspace = scratch.get();
    run_call(kind->brief, [&] { kind->kernels->forward(a); });
    return results.release().ptr();
  });
}

// backward(dy, dh_n, dc_n, x, y, states, tape, matrices, cell, batch_first, bias, need_dx, need_dstate, need_dw): what
// is needed of dx, dh0, dc0 and the gradients of all weights, in a list.
PyObject* backward(PyObject*, Arguments given, Py_ssize_t count) {
  return guarded(count, 14, [&]() -> PyObject* {
    const View dy(given[0]), dh_n(given[1]), dc_n(given[2]), x(given[3]), y(given[4]);
    const Views states = views(given[5]), tape = views(given[6]), matrices = views(given[7]);
    const bool bias = given[10] == Py_True, need_dx = given[11] == Py_True;
    const bool need_dstate = given[12] == Py_True, need_dw = given[13] == Py_True;
    const auto kind =
        find(x, matrices, matrices.size() * (bias ? 2 : 1), matrices.size() / 2, given[8], given[9]);
    bool fits = kind && x.cpu && x.dense && y.cpu && y.dense && states_fit(states, *kind) &&
                all_dense(tape) && all_dense(matrices) && tape.size() == kind->tape.size();
    for (const View* each : {&dy, &dh_n, &dc_n})
      fits = fits && (!each->given || (each->dense && each->cpu && each->dtype == kind->dtype));
    if (!fits) return ask(python.backward, given, 14, kind != nullptr);
    BackwardArgs a = kind->backward.args;
    const bool lstm = is_lstm(a.cell);
    py::object results = py::list();
    a.x.data = x.data;
    a.y.data = y.data;
    a.dy.data = dy.data;
    a.dh_n = dh_n.data;
    if (lstm) a.dc_n = dc_n.data;
    if (lstm) a.cells.data = tape[0].data;
    if (tape.size() > lstm) a.gates = tape[lstm].data;
    a.h0 = state(states, 0, *kind);
    if (lstm) a.c0 = state(states, 1, *kind);
    if (need_dx) a.dx.data = add(results, kind->x);
    if (need_dstate) a.dh0 = add(results, kind->state);
    if (need_dstate && lstm) a.dc0 = add(results, kind->state);
    a.want_weights = need_dw;
    for (int d = 0; d < a.directions; d++) {
      a.weights[d].w_ih = matrices[2 * d].data;
      a.weights[d].w_hh = matrices[2 * d + 1].data;
      if (!need_dw) continue;
      const Layout* const own = &kind->parameters[d * (bias ? 4 : 2)];
      a.grads[d].w_ih = add(results, own[0]);
      a.grads[d].w_hh = add(results, own[1]);
      if (!bias) continue;
      a.grads[d].b_ih = add(results, own[2]);
      a.grads[d].b_hh = add(results, own[3]);
    }
    const void* const wanted = need_dw ? &a : nullptr;
    size_t& bytes = kind->backward.workspace[present({a.dx.data, a.dy.data, a.dh_n, a.dc_n, a.dh0, wanted})];
    if (!bytes) bytes = kernels().backward_workspace(a) + 1;
    const Scratch scratch(bytes, true);
    a.workspace = scratch.get();
    run_call(kind->brief, [&] { kind->kernels->backward(a); });
    return results.release().ptr();
  });
}

// What would see an operator: nobody where each of these functions of torch returns something false and the tensors
// are of these types exactly.
struct Watch {
  PyObject *types = nullptr, *quiet = nullptr;
} watch;

std::array<PyObject*, 4> through;  // the same calls through torch's dispatcher

bool ordinary(PyObject* tensor) {
  const PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type != PyTuple_GET_ITEM(watch.types, 0) && type != PyTuple_GET_ITEM(watch.types, 1)) return false;
  // A lazy sign is the dispatcher's to carry out.
  return attribute(tensor, names().is_cpu).ptr() == Py_True &&
         method(tensor, names().is_neg).ptr() == Py_False;
}

bool unobserved(Arguments given, Py_ssize_t count) {
  if (!watch.quiet) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watch.quiet); i++) {
    const auto seen = checked(PyObject_CallNoArgs(PyTuple_GET_ITEM(watch.quiet, i)));
    if (seen.ptr() != Py_None && PyObject_IsTrue(seen.ptr())) return false;
  }
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject* const each = given[i];
    if (PyList_CheckExact(each)) {
      for (Py_ssize_t k = 0; k < PyList_GET_SIZE(each); k++)
        if (!ordinary(PyList_GET_ITEM(each, k))) return false;
    } else if (each != Py_None && !PyBool_Check(each) && !PyUnicode_CheckExact(each) && !ordinary(each)) {
      return false;
    }
  }
  return true;
}

template <typename Function>
PyMethodDef named(const char* name, Function* function) {
  PyMethodDef made = fast(name, function);
  made.ml_flags |= METH_KEYWORDS;
  return made;
}

// The call of an operator, without the dispatcher where nobody would see it there.
template <int kAt, Py_ssize_t kCount, PyObject* (*kFunction)(PyObject*, Arguments, Py_ssize_t)>
PyObject* operation(PyObject* self, Arguments given, Py_ssize_t count, PyObject* names) {
  const bool plain = count == kCount && (!names || !PyTuple_GET_SIZE(names));
  return guarded(1, 1, [&]() -> PyObject* {
    if (plain && unobserved(given, count)) return kFunction(self, given, count);
    if (!through[kAt]) throw std::invalid_argument("fastrnn: plain_operators was not called");
    return PyObject_Vectorcall(through[kAt], given, count, names);
  });
}

}  // namespace

void bind_compiled(py::module_& m) {
  m.def("plain_watch", [](const py::tuple& types, const py::tuple& quiet) {
    watch = {py::tuple(types).release().ptr(), py::tuple(quiet).release().ptr()};
  });
  m.def("plain_operators", [](const py::tuple& calls) {
    for (size_t i = 0; i < through.size(); i++) through[i] = py::object(calls[i]).release().ptr();
  });
  m.def("plain_setup", [](py::object forward, py::object train, py::object backward, py::object into) {
    python = {forward.release().ptr(), train.release().ptr(), backward.release().ptr(), into.release().ptr()};
  });
  // A kind of call: its key, the descriptions of a prepared call, and what to allocate.
  m.def("plain_known",
        [](const py::tuple& key, const py::capsule& forward, const py::capsule& backward,
           const py::tuple& outputs, const py::tuple& tape, const py::tuple& parameters, size_t state_bytes) {
          auto kind = std::make_shared<Kind>();
          kind->cell = key[0];
          kind->batch_first = key[1].cast<bool>();
          const View x(py::object(key[2]).ptr()), w_hh(py::object(key[3]).ptr());
          kind->dtype = x.dtype;
          kind->x_shape = x.shape;
          kind->w_hh_shape = w_hh.shape;
          kind->weights = parameters.size();
          kind->forward = description<ForwardArgs>(forward.ptr());
          kind->backward = description<BackwardArgs>(backward.ptr());
          kind->threads = kind->forward.args.threads;
          kind->directions = static_cast<size_t>(kind->forward.args.directions);
          kind->kernels = &kernels();
          kind->brief = x.shape[0] * x.shape[1] * w_hh.shape[0] * (x.shape[2] + w_hh.shape[1]) <= kBrief;
          kind->x = layout(outputs[0]);
          kind->y = layout(outputs[1]);
          kind->state = layout(outputs[2]);
          for (const auto& each : tape) kind->tape.push_back(layout(each));
          for (const auto& each : parameters) kind->parameters.push_back(layout(each));
          kind->zeros.assign(state_bytes, 0);
          if (known().size() >= kKinds) known().pop_back();
          known().insert(known().begin(), std::move(kind));
        });
  static PyMethodDef functions[] = {fast("plain_forward", forward<Results::made>),
                                    fast("plain_forward_train", forward<Results::taped>),
                                    fast("plain_backward", backward),
                                    fast("plain_forward_into", forward<Results::given>),
                                    named("plain_forward_op", operation<0, 5, forward<Results::made>>),
                                    named("plain_forward_train_op", operation<1, 5, forward<Results::taped>>),
                                    named("plain_backward_op", operation<2, 14, backward>),
                                    named("plain_forward_into_op", operation<3, 8, forward<Results::given>>),
                                    {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), functions) < 0) throw py::error_already_set();
}

}  // namespace fastrnn
