// A call without gradients of a kind seen before, through a stack of layers: whether it is still that call, its outputs and
// its layers in one function, since a small layer takes less time than Python's way to it. fastrnn/nn/stepper.py describes it.
#include "../cpu/pages.h"
#include "inference.h"
#include "views.h"

namespace fastrnn {
namespace {

// What tensors a call was prepared with: fastrnn/nn/cache.py keeps it beside the packed weights made of them.
struct Origin {
  struct Stamp {
    View view;
    int64_t version;  // -1: what the tensor holds may change
  };
  std::vector<py::object> refs;
  std::vector<Stamp> stamps;
  std::vector<std::pair<uintptr_t, uint64_t>> samples;

  Origin(const py::tuple& references, const py::tuple& versions, const std::string& addresses) {
    for (const auto& each : references) {
      refs.push_back(py::reinterpret_borrow<py::object>(each));
      stamps.push_back(
          {View(checked(PyObject_CallNoArgs(each.ptr())).ptr()), versions[stamps.size()].cast<int64_t>()});
    }
    for (size_t i = 0; i + 8 <= addresses.size(); i += 8) {
      uintptr_t at;
      uint64_t value;
      std::memcpy(&at, &addresses[i], 8);
      std::memcpy(&value, reinterpret_cast<const void*>(at), 8);
      samples.emplace_back(at, value);
    }
  }

  // Each tensor the same object at the same address, of the same version and dense, and then the sampled words, whose
  // addresses belong to the tensors still.
  bool is(PyObject* const* tensors, size_t count) const {
    if (count != refs.size()) return false;
    for (size_t i = 0; i < count; i++) {
      if (checked(PyObject_CallNoArgs(refs[i].ptr())).ptr() != tensors[i]) return false;
      const View view(tensors[i]);
      const auto& [was, version] = stamps[i];
      if (view.data != was.data || !view.like(was.dtype, was.shape)) return false;
      if (method(tensors[i], names().is_neg).ptr() != Py_False) return false;
      if (version < 0) continue;
      if (PyLong_AsLongLong(attribute(tensors[i], names().version).ptr()) != version) return false;
    }
    for (const auto& [at, value] : samples)
      if (std::memcmp(reinterpret_cast<const void*>(at), &value, 8)) return false;
    return true;
  }
};

constexpr const char* kOrigin = "fastrnn.origin";

const Origin& origin(PyObject* capsule) {
  const void* const at = PyCapsule_GetPointer(capsule, kOrigin);
  if (!at) throw py::error_already_set();
  return *static_cast<const Origin*>(at);
}

// unchanged(weights, origin)
PyObject* unchanged(PyObject*, Arguments a, Py_ssize_t count) {
  return guarded(count, 2, [&]() -> PyObject* {
    const auto all = checked(PySequence_Fast(a[0], "weights: expected a sequence"));
    return PyBool_FromLong(origin(a[1]).is(PySequence_Fast_ITEMS(all.ptr()),
                                           static_cast<size_t>(PySequence_Fast_GET_SIZE(all.ptr()))));
  });
}

struct Inference {
  static constexpr const char* kName = "fastrnn.inference";
  View x, h, c;  // as they have to be; h and c, if not given, are these: zeros
  Layout y, h_n, c_n;
  std::vector<InferenceLayer*> layers;
  std::vector<const Origin*> origins;
  py::object alive;  // what all of these point into
  int threads;
  size_t large;  // bytes of an output that is worth huge pages, else 0
  bool brief;    // the call keeps Python's lock
};

// Of torch: its own classes of tensors; functions of which one returns something true where a mode, a transform, a tracer or
// a profiler would see an operator; whether autocast would change what it does.
struct Watch {
  PyObject *types = nullptr, *eyes = nullptr, *autocast = nullptr;
} watch;

bool says_yes(PyObject* function) {
  const auto answer = checked(PyObject_CallNoArgs(function));
  return answer.ptr() != Py_None && answer.ptr() != Py_False && PyObject_IsTrue(answer.ptr());
}

bool unseen() {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watch.eyes); i++)
    if (says_yes(PyTuple_GET_ITEM(watch.eyes, i))) return false;
  return true;
}

// Of torch.Tensor exactly, or of another of torch's own classes.
bool own_class(PyObject* tensor, Py_ssize_t classes) {
  const PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  for (Py_ssize_t i = 0; i < classes; i++)
    if (type == PyTuple_GET_ITEM(watch.types, i)) return true;
  return false;
}
// The same, and with its sign carried out.
bool ordinary(PyObject* tensor, Py_ssize_t classes) {
  return own_class(tensor, classes) && method(tensor, names().is_neg).ptr() == Py_False;
}

bool fits(PyObject* tensor, const View& view, const View& like) {
  return view.like(like.dtype, like.shape) && ordinary(tensor, 1);
}

// unobserved(tensors): whether nobody would see an operator that is given these, None among them, and it would run here.
PyObject* unobserved(PyObject*, Arguments a, Py_ssize_t count) {
  return guarded(count, 1, [&]() -> PyObject* {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a[0]); i++) {
      PyObject* const each = PyTuple_GET_ITEM(a[0], i);
      if (each == Py_None) continue;
      if (!ordinary(each, PyTuple_GET_SIZE(watch.types)) || attribute(each, names().is_cpu).ptr() != Py_True)
        Py_RETURN_FALSE;
    }
    return PyBool_FromLong(unseen());
  });
}

// The tensors of a call with gradients, the last ones of which it may lack.
struct Likes {
  static constexpr const char* kName = "fastrnn.likes";
  std::vector<View> views;
  size_t least;
};

// resemble(likes, tensors): whether they are as described, dense and torch's own, and nobody would see an operator or change
// what it does.
PyObject* resemble(PyObject*, Arguments a, Py_ssize_t count) {
  return guarded(count, 2, [&]() -> PyObject* {
    const auto* const likes = static_cast<const Likes*>(PyCapsule_GetPointer(a[0], Likes::kName));
    if (!likes) throw py::error_already_set();
    const size_t size = PyList_Check(a[1]) ? static_cast<size_t>(PyList_GET_SIZE(a[1])) : 0;
    if (size != likes->least && size != likes->views.size()) Py_RETURN_FALSE;
    for (size_t i = 0; i < size; i++) {
      PyObject* const tensor = PyList_GET_ITEM(a[1], i);
      const View& like = likes->views[i];
      if (!ordinary(tensor, PyTuple_GET_SIZE(watch.types)) || !View(tensor).like(like.dtype, like.shape))
        Py_RETURN_FALSE;
    }
    return PyBool_FromLong(unseen() && !says_yes(watch.autocast));
  });
}

// footprint(tensors): dtype and shape of each as bytes, None among them; None where a tensor has to be asked itself.
PyObject* footprint(PyObject*, Arguments a, Py_ssize_t count) {
  return guarded(count, 1, [&]() -> PyObject* {
    if (!PyTuple_Check(a[0])) Py_RETURN_NONE;
    std::vector<int64_t> found;
    found.reserve(4 * PyTuple_GET_SIZE(a[0]));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a[0]); i++) {
      PyObject* const each = PyTuple_GET_ITEM(a[0], i);
      if (each != Py_None && !own_class(each, PyTuple_GET_SIZE(watch.types))) Py_RETURN_NONE;
      const View view(each);
      if (view.given && (!view.cpu || !view.data || view.dims > 3)) Py_RETURN_NONE;
      found.push_back(view.given ? view.dtype : -2);
      found.insert(found.end(), view.shape.begin(), view.shape.end());
    }
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(found.data()),
                                     found.size() * sizeof(int64_t));
  });
}

// The tensors of one origin after the other.
bool same_weights(const Inference& call, PyObject* weights) {
  if (!PyList_Check(weights)) return false;
  const size_t size = static_cast<size_t>(PyList_GET_SIZE(weights));
  PyObject* const* const all = PySequence_Fast_ITEMS(weights);
  size_t first = 0;
  for (const Origin* each : call.origins) {
    const size_t count = each->refs.size();
    if (first + count > size || !each->is(all + first, count)) return false;
    first += count;
  }
  return first == size;
}

const void* advance(const void* from, int64_t bytes) {
  return from ? static_cast<const char*>(from) + bytes : nullptr;
}
void* advance(void* from, int64_t bytes) { return from ? static_cast<char*>(from) + bytes : nullptr; }

// infer(description, x, h, c, weights, first): y, h_n and c_n (h_n again where there is none), or None if this is not the
// call described. h and c are None together for zeros; `first`: the number of the first step, for statistics of each.
PyObject* infer(PyObject*, Arguments given, Py_ssize_t count) {
  return guarded(count, 6, [&]() -> PyObject* {
    auto* const call = static_cast<Inference*>(PyCapsule_GetPointer(given[0], Inference::kName));
    if (!call) throw py::error_already_set();
    const View x(given[1]), h(given[2]), c(given[3]);
    if (!fits(given[1], x, call->x) || (h.given && !fits(given[2], h, call->h)) ||
        (c.given && !(call->c.given && h.given && fits(given[3], c, call->c))) ||
        (h.given && call->c.given && !c.given) || torch_threads() != call->threads || !unseen() ||
        says_yes(watch.autocast) || !same_weights(*call, given[4]))
      Py_RETURN_NONE;
    const int64_t first = PyLong_AsLongLong(given[5]);
    if (first < 0) throw std::invalid_argument("fastrnn: first: expected a number of steps");
    const py::object h_n = empty(call->h_n), c_n = call->c.given ? empty(call->c_n) : h_n;
    Step step{x.data,
              nullptr,
              h.given ? h.data : call->h.data,
              c.given ? c.data : call->c.data,
              View(h_n.ptr()).data,
              call->c.given ? View(c_n.ptr()).data : nullptr,
              first};
    py::object read, y;  // what a layer reads and makes
    for (InferenceLayer* layer : call->layers) {
      y = empty(call->y);
      step.y = View(y.ptr()).data;
      if (call->large) prefer_huge_pages(step.y, call->large);
      layer->run(step, call->brief);
      read = y;
      step.x = step.y;
      step.h0 = advance(step.h0, layer->h_bytes);
      step.c0 = advance(step.c0, layer->c_bytes);
      step.h_n = advance(step.h_n, layer->h_bytes);
      step.c_n = advance(step.c_n, layer->c_bytes);
    }
    return PyTuple_Pack(3, y.ptr(), h_n.ptr(), c_n.ptr());
  });
}

// A layer of LSTM, GRU or RNN.
class PlainLayer : public InferenceLayer {
 public:
  explicit PlainLayer(const ForwardArgs& args)
      : InferenceLayer(args, is_lstm(args.cell) ? 4 : 3), args_(args) {}
  void run(const Step& step, bool brief) override {
    ForwardArgs a = with_step(args_, step);
    a.c0 = step.c0;
    a.c_n = step.c_n;
    if (!bytes_) bytes_ = kernels().forward_workspace(a) + 1;
    const Scratch scratch(bytes_, false);
    a.workspace = scratch.get();
    run_call(brief, [&] { kernels().forward(a); });
  }

 private:
  ForwardArgs args_;
  size_t bytes_ = 0;
};

}  // namespace

void bind_inference(py::module_& m) {
  m.def("torch_setup", [](py::object exchange, py::object dtypes, py::object empty, py::object threads,
                          py::tuple types, py::tuple eyes, py::object autocast) {
    Torch& torch = torch_api();
    torch.dltensor = nullptr;
    if (!exchange.is_none()) {
      const auto* const api =
          static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
      if (!api) throw py::error_already_set();
      if (api->version.major == 1) torch.dltensor = api->dltensor_from_object;
    }
    torch.dtypes = dtypes.release().ptr();
    torch.empty = empty.release().ptr();
    torch.threads = threads.release().ptr();
    watch = {types.release().ptr(), eyes.release().ptr(), autocast.release().ptr()};
  });
  // References to tensors, the version of each or -1 if it may change, addresses of words that may not.
  m.def("describe_origin", [](const py::tuple& refs, const py::tuple& versions, const std::string& samples) {
    return py::capsule(new Origin(refs, versions, samples), kOrigin, [](PyObject* capsule) {
      delete static_cast<const Origin*>(PyCapsule_GetPointer(capsule, kOrigin));
    });
  });
  m.def("inference_layer", [](const py::tuple& problem, const py::tuple& tensors) {
    return in_capsule(std::make_unique<PlainLayer>(forward_args(problem, tensors)));
  });
  // Layers as the functions inference_layer give them; origins of all weights, in their order; tensors like x, h and c (None
  // where the cell has none), the states zero; layouts of y, h_n and c_n.
  m.def("describe_inference",
        [](const py::tuple& layers, const py::tuple& origins, const py::object& x, const py::object& h,
           const py::object& c, const py::tuple& layouts, size_t large, const py::object& alive) {
          if (layers.empty() || origins.empty() || layouts.size() != 3)
            throw std::invalid_argument("fastrnn: expected layers, origins of their weights and 3 layouts");
          auto made = std::make_unique<Inference>(Inference{View(x.ptr()),
                                                            View(h.ptr()),
                                                            View(c.ptr()),
                                                            layout(layouts[0]),
                                                            layout(layouts[1]),
                                                            c.is_none() ? Layout{} : layout(layouts[2]),
                                                            {},
                                                            {},
                                                            py::make_tuple(alive, layers, origins, h, c),
                                                            0,
                                                            large,
                                                            false});
          int64_t products = 0;
          for (const auto& each : layers) {
            made->layers.push_back(&inference_layer(each.ptr()));
            products += made->layers.back()->products;
            made->threads = made->layers.back()->threads;
          }
          for (const auto& each : origins) made->origins.push_back(&origin(each.ptr()));
          made->brief = products <= kBrief;
          return py::capsule(made.release(), Inference::kName, [](PyObject* capsule) {
            delete static_cast<Inference*>(PyCapsule_GetPointer(capsule, Inference::kName));
          });
        });
  // Of these the last may be absent, down to `least`.
  m.def("describe_likes", [](const py::list& tensors, size_t least) {
    auto made = std::make_unique<Likes>();
    made->least = least;
    for (const auto& each : tensors) made->views.emplace_back(each.ptr());
    return py::capsule(made.release(), Likes::kName, [](PyObject* capsule) {
      delete static_cast<Likes*>(PyCapsule_GetPointer(capsule, Likes::kName));
    });
  });
  static PyMethodDef functions[] = {fast("footprint", footprint),   fast("infer", infer),
                                    fast("resemble", resemble),     fast("unchanged", unchanged),
                                    fast("unobserved", unobserved), {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), functions) < 0) throw py::error_already_set();
}

}  // namespace fastrnn
