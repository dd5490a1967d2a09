// A CUDA grid on one host thread: seeded schedules, weak global memory, checked shared memory, deadlocks reported.
// docs/cuda-kernels.md says what it can see and what it cannot.
#pragma once
#include <algorithm>

#include "cluster.h"
#include "collectives.h"
#include "machine.h"
#include "memory.h"
#include "shared.h"

namespace emu {

inline void thread_main() {
  self().fiber.entered();
  machine().kernel();
  Thread& me = self();
  me.done = true;
  me.cta->live--;
  me.warp->live--;
  me.cluster->live--;
  me.fiber.yield(true);
  std::abort();
}

inline void prepare(Machine& m) {
  const Launch& c = m.config;
  const unsigned warps = (c.block + kWarp - 1) / kWarp;
  m.error.clear();
  m.flying.clear();
  m.changes.clear();
  m.random = Random{c.seed};
  m.ctas.assign(c.grid, Cta{});
  m.clusters.assign((c.grid + c.cluster - 1) / c.cluster, Cluster{});
  m.threads.assign(size_t(c.grid) * c.block, Thread{});
  for (unsigned b = 0; b < c.grid; b++) {
    Cta& cta = m.ctas[b];
    cta.index = b;
    cta.live = c.block;
    cta.shared.assign(c.shared_bytes, 0xA5);
    cta.shadow.assign((c.shared_bytes + 3) / 4, Shadow{});
    cta.warps.resize(warps);
    for (unsigned i = 0; i < c.block; i++) {
      Thread& t = m.threads[size_t(b) * c.block + i];
      t.index = i;
      t.lane = i % kWarp;
      t.cta = &cta;
      t.warp = &cta.warps[i / kWarp];
      t.warp->live++;
      t.cluster = &m.clusters[b / c.cluster];
      t.cluster->live++;
      t.fiber.prepare(m.stacks.at(size_t(b) * c.block + i), &thread_main);
    }
  }
}

// Runs one warp until each of its threads waits or has polled in vain; true if any got further.
inline bool run_warp(Machine& m, size_t first, size_t end, size_t* left) {
  bool progress = false;
  for (bool again = true; again && m.error.empty();) {
    again = false;
    for (size_t i = first; i < end; i++) {
      Thread& t = m.threads[i];
      if (t.done || t.spins || (t.waits_for && *t.waits_for == t.generation)) continue;
      m.current = &t;
      t.fiber.resume();
      if (t.done) --*left;
      if (!t.spins) again = progress = true;
    }
  }
  for (size_t i = first; i < end; i++) m.threads[i].spins = false;
  return progress;
}

// Where the threads that will never go on are waiting: one line per CTA and site.
inline std::string stuck(const Machine& m) {
  std::string out = "deadlock";
  for (const Cta& cta : m.ctas) {
    const Thread* first = nullptr;
    unsigned count = 0;
    for (const Thread& t : m.threads)
      if (t.cta == &cta && !t.done && (!first || t.site == first->site)) {
        if (!first) first = &t;
        count++;
      }
    if (first)
      out += "\n  CTA " + std::to_string(cta.index) + ": " + std::to_string(count) + " threads at " +
             first->site + ", the first in warp " + std::to_string(first->index / kWarp) + " lane " +
             std::to_string(first->lane);
  }
  return out;
}

template <class Kernel>
Report launch(const Launch& config, Kernel kernel) {
  Machine& m = machine();
  m.config = config;
  m.kernel = kernel;
  prepare(m);
  const unsigned warps = (config.block + kWarp - 1) / kWarp;
  std::vector<unsigned> order(size_t(config.grid) * warps);
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  size_t left = m.threads.size();
  for (int idle = 0; left && m.error.empty();) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[m.random.below(i)]);
    const uint64_t before = m.events;
    m.rounds++;
    bool progress = false, skipped = false;
    for (unsigned w : order) {
      if (static_cast<int>(w / warps) == config.slow_cta && m.random.below(config.slow_factor)) {
        skipped = true;
        deliver_some(m, 4);
        continue;
      }
      const size_t first = size_t(w / warps) * config.block + size_t(w % warps) * kWarp;
      const size_t end = std::min<size_t>(first + kWarp, (w / warps + 1) * size_t(config.block));
      progress |= run_warp(m, first, end, &left);
      drain_some(m.ctas[w / warps], 4);
      deliver_some(m, 4);
    }
    idle = progress || m.events != before ? 0 : idle + !skipped;
    // In vain for several rounds: nothing on its way either, so nobody can go on.
    if (idle > config.patience) {
      bool pending = !m.flying.empty();
      for (const Cta& cta : m.ctas) pending |= !cta.queue.empty();
      if (!pending) m.error = stuck(m);
    }
  }
  for (Cta& cta : m.ctas)
    while (!cta.queue.empty()) drain(cta, 0);
  return {m.error};
}

}  // namespace emu
