// Python's door to the CPU library: integers in (sizes and addresses), nothing kept, the GIL released.
// fastrnn/backends/cpu.py is the only caller; it owns every buffer and names the fields in this order.
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "../cpu/layer.h"
#include "../cpu/pages.h"
#include "../cpu/team.h"
#include "args.h"

namespace py = pybind11;
using namespace fastrnn;

namespace fastrnn {
void bind_bnlstm(py::module_& m);
void bind_rhn(py::module_& m);
void bind_compiled(py::module_& m);
void bind_inference(py::module_& m);
void bind_large_memory(py::module_& m);
void bind_tensors(py::module_& m);
}  // namespace fastrnn

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastrnn's CPU kernels; see fastrnn/backends/cpu.py";
  m.attr("version") = FASTRNN_VERSION;
  bind_bnlstm(m);
  m.def("isa", [] { return kernels().isa; });
  m.def("cpu_vendor", &cpu_vendor);
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
  m.def("prefer_huge_pages",
        [](intptr_t data, size_t bytes) { prefer_huge_pages(reinterpret_cast<const void*>(data), bytes); });
  m.def("random", [](intptr_t seed, uint32_t stream, uint64_t threshold, int64_t T, int64_t N, int64_t units,
                     int threads, intptr_t words, intptr_t keep) {
    const RandomArgs a{*reinterpret_cast<const uint64_t*>(seed), stream, threshold, T, N, units, threads};
    py::gil_scoped_release release;
    kernels().random(a, reinterpret_cast<uint32_t*>(words), reinterpret_cast<uint8_t*>(keep));
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
  bind_compiled(m);
  bind_inference(m);
  bind_large_memory(m);
  bind_tensors(m);
}
