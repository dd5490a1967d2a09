// A call without gradients of a kind seen before, through a stack of layers: whether it is still that call, its outputs and
// its layers in one function, since a small layer takes less time than Python's way to it. fastrnn/nn/stepper.py describes it.
#include "../cpu/pages.h"
#include "views.h"

namespace fastrnn {
namespace {

// Of what a layer's packed weights were made, as fastrnn/nn/cache.py keeps it.
struct Origin {
  std::vector<py::object> refs;
  std::vector<std::pair<const void*, int64_t>> stamps;
  std::vector<std::pair<uintptr_t, uint64_t>> samples;

  Origin(const py::tuple& references, const py::tuple& of_each, const std::string& addresses) {
    for (const auto& each : references) refs.push_back(py::reinterpret_borrow<py::object>(each));
    for (const auto& each : of_each) {
      const auto stamp = py::reinterpret_borrow<py::tuple>(each);
      stamps.emplace_back(address(py::object(stamp[0]).ptr()), stamp[1].cast<int64_t>());
    }
    for (size_t i = 0; i + 8 <= addresses.size(); i += 8) {
      uintptr_t at;
      uint64_t value;
      std::memcpy(&at, &addresses[i], 8);
      std::memcpy(&value, reinterpret_cast<const void*>(at), 8);
      samples.emplace_back(at, value);
    }
  }

  // Each weight the same object at the same address, of the same version and dense, and then the sampled words, whose
  // addresses belong to the weights still.
  bool is(PyObject* const* weights, size_t count) const {
    if (count != refs.size()) return false;
    for (size_t i = 0; i < count; i++) {
      if (checked(PyObject_CallNoArgs(refs[i].ptr())).ptr() != weights[i]) return false;
      const View view(weights[i]);
      if (view.data != stamps[i].first || !view.dense) return false;
      if (PyLong_AsLongLong(attribute(weights[i], names().version).ptr()) != stamps[i].second) return false;
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
  std::vector<Described<ForwardArgs>> layers;
  std::vector<const Origin*> origins;
  py::object alive;  // what all of these point into
  long threads;
  bool large, brief;  // an output is worth huge pages; the call keeps Python's lock
};

// What would see an operator: nobody where each of these functions of torch returns something false.
PyObject* quiet = nullptr;

bool unobserved() {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(quiet); i++) {
    const auto seen = checked(PyObject_CallNoArgs(PyTuple_GET_ITEM(quiet, i)));
    if (seen.ptr() == Py_None || seen.ptr() == Py_False) continue;
    if (PyObject_IsTrue(seen.ptr())) return false;
  }
  return true;
}

PyObject* tensor_type = nullptr;

// A tensor like the one described, of torch's own class exactly.
bool fits(PyObject* tensor, const View& view, const View& like) {
  return reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == tensor_type && view.like(like.dtype, like.shape) &&
         method(tensor, names().is_neg).ptr() == Py_False;  // a lazy sign is torch's to carry out
}

bool same_weights(const Inference& call, PyObject* weights) {
  if (!PyList_Check(weights)) return false;
  const size_t size = static_cast<size_t>(PyList_GET_SIZE(weights)), per = size / call.origins.size();
  if (per * call.origins.size() != size) return false;
  std::vector<PyObject*> own(per);
  for (size_t k = 0; k < call.origins.size(); k++) {
    for (size_t i = 0; i < per; i++) own[i] = PyList_GET_ITEM(weights, k * per + i);
    if (!call.origins[k]->is(own.data(), per)) return false;
  }
  return true;
}

template <typename Pointer>
Pointer* advance(Pointer* from, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
  return from ? static_cast<Byte*>(from) + bytes : nullptr;
}

void run_layer(Described<ForwardArgs>& layer, ForwardArgs& a, bool brief) {
  size_t& bytes = layer.workspace[0];
  if (!bytes) bytes = kernels().forward_workspace(a) + 1;
  const Scratch scratch(bytes, false);
  a.workspace = scratch.get();
  if (brief) return kernels().forward(a);
  py::gil_scoped_release release;
  kernels().forward(a);
}

// infer(description, x, h, c, weights): y, h_n and c_n (h_n again where there is none), or None if this is not the call
// described. h and c are None together for zeros.
PyObject* infer(PyObject*, Arguments given, Py_ssize_t count) {
  return guarded(count, 5, [&]() -> PyObject* {
    auto* const call = static_cast<Inference*>(PyCapsule_GetPointer(given[0], Inference::kName));
    if (!call) throw py::error_already_set();
    const View x(given[1]), h(given[2]), c(given[3]);
    if (!fits(given[1], x, call->x) || (h.given && !fits(given[2], h, call->h)) ||
        (c.given && !(call->c.given && h.given && fits(given[3], c, call->c))) ||
        (h.given && call->c.given && !c.given) || torch_threads() != call->threads || !unobserved() ||
        !same_weights(*call, given[4]))
      Py_RETURN_NONE;
    const auto output = [&](const Layout& like) {
      auto made = empty(like);
      if (!call->large) return made;
      const auto& a = call->layers[0].args;
      prefer_huge_pages(View(made.ptr()).data, a.T * a.N * a.O * a.directions * (x.dtype % View::kBrain / 8));
      return made;
    };
    py::object from = py::reinterpret_borrow<py::object>(given[1]), y;
    const py::object h_n = empty(call->h_n), c_n = call->c.given ? empty(call->c_n) : h_n;
    const void *h0 = h.given ? h.data : call->h.data, *c0 = c.given ? c.data : call->c.data;
    void *h_at = View(h_n.ptr()).data, *c_at = call->c.given ? View(c_n.ptr()).data : nullptr;
    const void* at = x.data;
    for (auto& layer : call->layers) {
      y = output(call->y);
      ForwardArgs a = layer.args;
      a.x.data = const_cast<void*>(at);
      at = a.y.data = View(y.ptr()).data;
      a.h0 = h0;
      a.c0 = c0;
      a.h_n = h_at;
      a.c_n = c_at;
      run_layer(layer, a, call->brief);
      from = y;  // what the next layer reads
      const int64_t of_one = a.directions * a.N * (x.dtype % View::kBrain / 8);
      h0 = advance(h0, of_one * a.O);
      c0 = advance(c0, of_one * a.H);
      h_at = advance(h_at, of_one * a.O);
      c_at = advance(c_at, of_one * a.H);
    }
    return PyTuple_Pack(3, y.ptr(), h_n.ptr(), c_n.ptr());
  });
}

}  // namespace

void bind_inference(py::module_& m) {
  m.def("torch_setup", [](py::object exchange, py::object dtypes, py::object empty, py::object threads,
                          py::object tensor, py::tuple would_see) {
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
    tensor_type = tensor.release().ptr();
    quiet = would_see.release().ptr();
  });
  m.def("describe_origin", [](const py::tuple& refs, const py::tuple& stamps, const std::string& samples) {
    return py::capsule(new Origin(refs, stamps, samples), kOrigin, [](PyObject* capsule) {
      delete static_cast<const Origin*>(PyCapsule_GetPointer(capsule, kOrigin));
    });
  });
  // Layers as describe_forward gives them and the origins of their weights; tensors like x, h and c (None where the cell has
  // none), the states zero; layouts of y, h_n and c_n.
  m.def("describe_inference",
        [](const py::tuple& layers, const py::tuple& origins, const py::object& x, const py::object& h,
           const py::object& c, const py::tuple& layouts, bool large, const py::object& alive) {
          if (layers.empty() || origins.size() != layers.size())
            throw std::invalid_argument("fastrnn: expected an origin of the weights of each layer");
          auto made = std::unique_ptr<Inference>(new Inference{View(x.ptr()),
                                                               View(h.ptr()),
                                                               View(c.ptr()),
                                                               layout(layouts[0]),
                                                               layout(layouts[1]),
                                                               c.is_none() ? Layout{} : layout(layouts[2]),
                                                               {},
                                                               {},
                                                               py::make_tuple(alive, origins, h, c),
                                                               0,
                                                               large,
                                                               false});
          int64_t products = 0;
          for (const auto& each : layers) {
            made->layers.push_back(description<ForwardArgs>(each.ptr()));
            const ForwardArgs& a = made->layers.back().args;
            products += a.T * a.N * a.H * (a.I + a.O) * (is_lstm(a.cell) ? 4 : 3);
            made->threads = a.threads;
          }
          for (const auto& each : origins) made->origins.push_back(&origin(each.ptr()));
          made->brief = products <= kBrief;
          return py::capsule(made.release(), Inference::kName, [](PyObject* capsule) {
            delete static_cast<Inference*>(PyCapsule_GetPointer(capsule, Inference::kName));
          });
        });
  static PyMethodDef functions[] = {
      fast("infer", infer), fast("unchanged", unchanged), {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), functions) < 0) throw py::error_already_set();
}

}  // namespace fastrnn
