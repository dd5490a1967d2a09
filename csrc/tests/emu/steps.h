// A call's launches on the emulator, one after another.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "../../cuda/steps/functions.cuh"

namespace emu {

constexpr int kGraphSteps = 3;  // of a graph; a sequence has some and a rest

// Packs `weights[direction][product]` into the workspace and runs all steps; empty, or what went wrong. Every launch gets another
// schedule.
template <class Params>
std::string run_steps(const fastrnn::cuda::StepsProblem& q, const fastrnn::cuda::StepsKernels& k,
                      Params params, const void* const (&weights)[2][2], void* workspace, uint64_t seed) {
  using namespace fastrnn::cuda;
  std::string failure;
  const auto run = [&](const StepsLaunch& l, auto kernel) {
    Launch e;
    e.grid = l.grid, e.block = l.block, e.shared_bytes = l.shared_bytes;
    e.seed = ++seed;
    const Report r = launch(e, kernel);
    if (!r.ok()) failure = r.error;
    return r.ok();
  };
  const auto call = [](const void* f) { return const_cast<void*>(f); };
  steps_bind(q, k.tile, &params, workspace);
  if (!steps_matrices(q, params, [&](int d, int i, const StepsMatrix& matrix, Vec4* packed) {
        StepsLaunch l;
        l.grid = 2, l.block = 256;
        const StepsPack pack{weights[d][i], packed, k.tile, matrix};
        return run(l, [&] { reinterpret_cast<void (*)(StepsPack)>(call(k.pack))(pack); });
      }))
    return "pack: " + failure;
  Params* block = static_cast<Params*>(workspace);
  const auto write = [&](Params* to, const Params& value) {
    StepsLaunch l;
    l.grid = 1, l.block = 256;
    return run(l, [&] { reinterpret_cast<void (*)(Params, Params*)>(call(k.block))(value, to); });
  };
  if (!write(block, params)) return "block: " + failure;
  const StepsProgram program = steps_program(k, q);
  const auto step = [&](const StepsLaunch& l, int s) {
    return run(l, [&] {
      if (l.which >= 0)
        reinterpret_cast<void (*)(const StepsParams*, int, int)>(call(l.function))(block, s, l.which);
      else
        reinterpret_cast<void (*)(const Params*, int)>(call(l.function))(block, s);
    });
  };
  if (!step(program.begin, 0)) return failure;
  // As steps_launch.cu: whole graphs, whose steps count from the first one in a block of their own, then the rest.
  std::vector<Vec4> of_graph(kStepsBlockBytes / sizeof(Vec4));
  const int count = params.launched();
  int s = 0;
  for (; s + kGraphSteps <= count; s += kGraphSteps) {
    Params part = params;
    part.first = s;
    block = reinterpret_cast<Params*>(of_graph.data());
    if (!write(block, part) || !steps_range(program, 0, kGraphSteps, step)) return failure;
  }
  block = static_cast<Params*>(workspace);
  if (steps_range(program, s, count, step)) steps_after(program, count, step);
  return failure;
}

}  // namespace emu
