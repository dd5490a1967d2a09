// Python's door to the CPU library: integers in (sizes and addresses), nothing kept, the GIL released.
// fastrnn/backends/cpu.py is the only caller; it owns every buffer and names the fields in this order.
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "../cpu/layer.h"
#include "../cpu/team.h"
#include "fields.h"

namespace py = pybind11;
using namespace fastrnn;

namespace fastrnn {
void bind_rhn(py::module_& m);
}

namespace {

void read_problem(Fields& f, Problem& p) {
  p.cell = static_cast<Cell>(f.integer());
  p.type = static_cast<Type>(f.integer());
  p.partition = static_cast<Partition>(f.integer());
  p.linear = f.integer() != 0;
  p.threads = static_cast<int>(f.integer());
  p.directions = static_cast<int>(f.integer());
  p.T = f.integer();
  p.N = f.integer();
  p.I = f.integer();
  p.H = f.integer();
  p.O = f.integer();
  p.projected = f.integer() != 0;
}

void read_sequence(Fields& f, Problem& p) {
  p.batch_sizes = static_cast<const int64_t*>(f.address());
  p.lengths = static_cast<const int64_t*>(f.address());
  p.reset = static_cast<const uint8_t*>(f.address());
  p.reset_stride_t = f.integer();
  p.reset_stride_n = f.integer();
}

// Where a call has none, its tuple ends before.
void read_noise(Fields& f, Problem& p) {
  if (f.at_end()) return;
  Noise& n = p.noise;
  n.seed = static_cast<const uint64_t*>(f.address());
  n.layer = f.integer();
  n.training = f.integer() != 0;
  n.mode = static_cast<Drop>(f.integer());
  n.per_sequence = f.integer() != 0;
  n.drop = f.real();
  n.zoneout_h = f.real();
  n.zoneout_c = f.real();
}

void read_weights(Fields& f, const Problem& p, Weights* w) {
  for (int d = 0; d < p.directions; d++) {
    w[d] = {f.address(), f.address(), f.address(), f.address(), f.address()};
    if (!normalises(p.cell)) continue;
    w[d].ln_ih = f.address();
    w[d].ln_hh = f.address();
    w[d].ln_c = f.address();
    w[d].ln_bias_c = f.address();
  }
}

ForwardArgs forward_args(const py::tuple& problem, const py::tuple& tensors) {
  ForwardArgs a;
  Fields f(problem);
  read_problem(f, a);
  f.end();
  Fields g(tensors);
  a.x = g.strides();
  a.y = g.strides();
  a.cells = g.strides();
  a.x.data = g.address();
  a.y.data = g.address();
  a.cells.data = g.address();
  a.h0 = g.address();
  a.c0 = g.address();
  a.h_n = g.address();
  a.c_n = g.address();
  a.packed = g.address();
  a.gates = g.address();
  read_sequence(g, a);
  read_weights(g, a, a.weights);
  read_noise(g, a);
  g.end();
  return a;
}

BackwardArgs backward_args(const py::tuple& problem, const py::tuple& tensors) {
  BackwardArgs a;
  Fields f(problem);
  read_problem(f, a);
  f.end();
  Fields g(tensors);
  a.x = a.dx = g.strides();
  a.y = a.dy = g.strides();
  a.cells = a.dcells = g.strides();
  a.x.data = g.address();
  a.y.data = g.address();
  a.cells.data = g.address();
  a.dx.data = g.address();
  a.dy.data = g.address();
  a.dcells.data = g.address();
  a.h0 = g.address();
  a.c0 = g.address();
  a.dh_n = g.address();
  a.dc_n = g.address();
  a.dh0 = g.address();
  a.dc0 = g.address();
  a.gates = g.address();
  a.want_weights = g.integer() != 0;
  read_sequence(g, a);
  read_weights(g, a, a.weights);
  for (int d = 0; d < a.directions && a.want_weights; d++) {
    a.grads[d] = {g.address(), g.address(), g.address(), g.address(), g.address()};
    if (!normalises(a.cell)) continue;
    a.grads[d].ln_ih = g.address();
    a.grads[d].ln_hh = g.address();
    a.grads[d].ln_c = g.address();
    a.grads[d].ln_bias_c = g.address();
  }
  read_noise(g, a);
  g.end();
  return a;
}

}  // namespace

void bind_bnlstm(py::module_&);

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastrnn's CPU kernels; see fastrnn/backends/cpu.py";
  m.attr("version") = FASTRNN_VERSION;
  bind_bnlstm(m);
  m.def("isa", [] { return kernels().isa; });
  m.def("isas", [] {
    py::list out;
    for (const char* const* n = available_isas(); *n; n++) out.append(py::str(*n));
    return out;
  });
  m.def("select_isa", [](const std::string& name) {
    if (select_isa(name.c_str())) return;
    std::string known;
    for (const char* const* n = available_isas(); *n; n++)
      known += std::string(known.empty() ? "" : ", ") + *n;
    throw std::invalid_argument("isa: got '" + name + "', this machine has " + known);
  });
  m.def("team_kind", &team_kind);
  m.def("team_configure", &team_configure);
  m.def("plan", [](const py::tuple& problem) {
    Problem p;
    Fields f(problem);
    read_problem(f, p);
    int threads = 0;
    const Partition partition = kernels().plan(p, &threads);
    return py::make_tuple(threads, partition == Partition::units ? "units" : "rows");
  });
  m.def("packed_bytes", [](const py::tuple& problem) {
    Problem p;
    Fields f(problem);
    read_problem(f, p);
    return kernels().packed_bytes(p);
  });
  m.def("pack", [](const py::tuple& problem, const py::tuple& weights, intptr_t packed) {
    Problem p;
    Fields f(problem);
    read_problem(f, p);
    Weights w[2];
    Fields g(weights);
    read_weights(g, p, w);
    py::gil_scoped_release release;
    kernels().pack(p, w, reinterpret_cast<void*>(packed));
  });
  m.def("forward_workspace", [](const py::tuple& problem, const py::tuple& tensors) {
    return kernels().forward_workspace(forward_args(problem, tensors));
  });
  m.def("forward", [](const py::tuple& problem, const py::tuple& tensors, intptr_t workspace) {
    ForwardArgs a = forward_args(problem, tensors);
    a.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    kernels().forward(a);
  });
  m.def("backward_workspace", [](const py::tuple& problem, const py::tuple& tensors) {
    return kernels().backward_workspace(backward_args(problem, tensors));
  });
  m.def("backward", [](const py::tuple& problem, const py::tuple& tensors, intptr_t workspace) {
    BackwardArgs a = backward_args(problem, tensors);
    a.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    kernels().backward(a);
  });
  m.def("random", [](intptr_t seed, uint32_t stream, uint64_t threshold, int64_t T, int64_t N, int64_t units,
                     int threads, intptr_t words, intptr_t keep) {
    const RandomArgs a{*reinterpret_cast<const uint64_t*>(seed), stream, threshold, T, N, units, threads};
    py::gil_scoped_release release;
    kernels().random(a, reinterpret_cast<uint32_t*>(words), reinterpret_cast<uint8_t*>(keep));
  });
  m.def("read_words", [](const py::bytes& addresses) {
    char *at, *out;
    Py_ssize_t bytes;
    PyBytes_AsStringAndSize(addresses.ptr(), &at, &bytes);
    PyObject* words = PyBytes_FromStringAndSize(nullptr, bytes / 8 * 8);
    if (!words) throw py::error_already_set();
    out = PyBytes_AS_STRING(words);
    for (Py_ssize_t i = 0; i + 8 <= bytes; i += 8) {
      uint64_t address;
      std::memcpy(&address, at + i, 8);
      std::memcpy(out + i, reinterpret_cast<const void*>(static_cast<uintptr_t>(address)), 8);
    }
    return py::reinterpret_steal<py::bytes>(words);
  });
  m.def(
      "measure_peak_flops",
      [](int threads, double seconds) { return kernels().peak_flops(threads, seconds); }, py::arg("threads"),
      py::arg("seconds") = 0.5, py::call_guard<py::gil_scoped_release>());
  m.def(
      "measure_bandwidth",
      [](int threads, size_t bytes_per_thread, double seconds) {
        return kernels().bandwidth(threads, bytes_per_thread, seconds);
      },
      py::arg("threads"), py::arg("bytes_per_thread"), py::arg("seconds") = 0.5,
      py::call_guard<py::gil_scoped_release>());
  bind_rhn(m);
}
