// A call's launches on the emulator, one after another.
#pragma once
#include <cstring>
#include <string>

#include "../../cuda/steps/functions.cuh"

namespace emu {

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
  for (int d = 0; d < q.directions; d++)
    for (int i = 0; i < q.products(); i++) {
      StepsLaunch l;
      l.grid = 2, l.block = 256;
      const StepsPack pack{weights[d][i], const_cast<Vec4*>(params.work[d].weights[i]), k.tile, q.matrix(i)};
      if (!run(l, [&] { reinterpret_cast<void (*)(StepsPack)>(call(k.pack))(pack); }))
        return "pack: " + failure;
    }
  Params* const block = static_cast<Params*>(workspace);
  StepsLaunch first;
  first.grid = 1, first.block = 256;
  if (!run(first, [&] { reinterpret_cast<void (*)(Params, Params*)>(call(k.block))(params, block); }))
    return "block: " + failure;
  const StepsProgram program = steps_program(k, q);
  const auto step = [&](const StepsLaunch& l, int s) {
    return run(l, [&] {
      if (l.which >= 0)
        reinterpret_cast<void (*)(const StepsParams*, int, int)>(call(l.function))(block, s, l.which);
      else
        reinterpret_cast<void (*)(const Params*, int)>(call(l.function))(block, s);
    });
  };
  if (step(program.begin, 0) && steps_range(program, 0, params.T, step)) steps_after(program, params.T, step);
  return failure;
}

}  // namespace emu
