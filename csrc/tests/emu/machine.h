// The emulated device: threads, warps, CTAs and what they wait for. All CTAs are resident at once, as a cooperative
// launch promises; a thread runs until it waits, so memory is interleaved at barriers, warp collectives and polls.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"

namespace emu {

struct Random {  // SplitMix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return next() % n; }
};

// Threads meet here; the generation counts the meetings and so orders memory accesses.
struct Rendezvous {
  unsigned arrived = 0;
  uint64_t generation = 0;
  uint64_t view = 0;  // the latest event that any of them has acquired
};

constexpr int kWarp = 32;

// What a lane brings to a warp collective. Results are written through `result`, on the lane's own stack.
struct Operand {
  const char* what = nullptr;
  uint32_t word[6] = {};
  void* result = nullptr;
};

struct Warp {
  Rendezvous collective, sync;  // sync orders memory (__syncwarp), a collective does not
  Operand operand[kWarp];
  unsigned live = 0;
};

constexpr int kManyReaders = 1 << 30;

struct Shadow {  // of one 32-bit word of shared memory: who touched it last, and in which epochs
  int writer = -1, reader = -1, reader_warp = -1;
  uint64_t write_block = 0, write_warp = 0, read_block = 0, read_warp = 0;
  bool written = false;
};

struct PendingStore {  // of one 32-bit word of global memory
  uint32_t* address;
  uint32_t value;
  unsigned thread, warp;
  uint64_t block_epoch, warp_epoch;
};

struct Change {  // what a word was before it changed last, since when; when that was and whose store it was
  uint32_t old;
  uint64_t old_event, event;
  unsigned cta;
};

struct TransactionBarrier {  // an mbarrier in shared memory
  int64_t pending_bytes = 0;
  int count = 0, pending = 0;
  uint64_t phase = 0;
  bool live = false;
};

struct Cta {
  unsigned index = 0, live = 0;
  Rendezvous barrier;
  std::vector<uint8_t> shared;
  std::vector<Shadow> shadow;
  std::vector<PendingStore> queue;
  std::vector<Warp> warps;
  std::vector<TransactionBarrier> mbarriers;
};

struct Cluster {
  Rendezvous barrier;
  unsigned live = 0;
};

// A push into the shared memory of a CTA of the same cluster, on its way.
struct AsyncStore {
  Cta* to;
  uint32_t offset, value;
  int mbarrier;
};

// An asynchronous copy into shared memory, on its way; from null: zeros.
struct AsyncCopy {
  uint32_t offset;
  const void* from;
  size_t bytes;
};

struct Thread {
  Fiber fiber;
  unsigned index = 0, lane = 0;
  Cta* cta = nullptr;
  Warp* warp = nullptr;
  Cluster* cluster = nullptr;
  const uint64_t* waits_for = nullptr;  // a generation to change, or null
  uint64_t generation = 0;
  uint64_t acquired = 0;  // events up to here are seen by every load
  std::unordered_map<const uint32_t*, uint64_t> seen_changes;
  std::vector<std::vector<AsyncCopy>> copies = {{}};  // by group, the last one still open
  bool done = false, spins = false;
  const char* site = "start";
};

struct Launch {
  unsigned grid = 1, block = 32, cluster = 1;
  size_t shared_bytes = 0;
  uint64_t seed = 1;
  int patience = 8;                    // rounds without progress that count as a deadlock
  int slow_cta = -1, slow_factor = 1;  // its warps run in one round of so many: others may get far ahead
};

struct Report {
  std::string error;  // empty: all threads ended and nothing was found
  bool ok() const { return error.empty(); }
};

struct Machine {
  Launch config;
  std::vector<Thread> threads;
  std::vector<Cta> ctas;
  std::vector<Cluster> clusters;
  std::vector<AsyncStore> flying;
  std::unordered_map<const uint32_t*, Change> changes;
  Thread* current = nullptr;
  std::function<void()> kernel;
  Random random{1};
  uint64_t rounds = 0;  // of the scheduler: time
  uint64_t events = 0;  // stores that became visible: progress that a spinning thread may wait for
  std::string error;
  int mutation = 0;  // which planted error is switched on; see core/mutate.cuh
  Stacks stacks;

  void fail(const std::string& what) {
    if (!error.empty()) return;
    char where[160];
    std::snprintf(where, sizeof where, " (CTA %u, warp %u, lane %u, last at %s)", current->cta->index,
                  current->index / kWarp, current->lane, current->site);
    error = what + where;
  }
};

inline Machine& machine() {
  static Machine m;
  return m;
}
inline Thread& self() { return *machine().current; }

inline void yield() { self().fiber.yield(); }

inline void wait_for(Rendezvous& r, uint64_t generation, const char* site) {
  Thread& me = self();
  me.site = site;
  while (r.generation == generation) {
    me.waits_for = &r.generation;
    me.generation = generation;
    yield();
  }
  me.waits_for = nullptr;
}

// The last of `needed` threads runs `finish` for all of them, then lets them go.
template <class Finish>
void meet(Rendezvous& r, unsigned needed, const char* site, Finish finish) {
  const uint64_t generation = r.generation;
  if (++r.arrived < needed) return wait_for(r, generation, site);
  self().site = site;
  finish();
  r.arrived = 0;
  ++r.generation;
}

// A barrier that orders memory: what one has acquired, all have.
inline void meet(Rendezvous& r, unsigned needed, const char* site) {
  Thread& me = self();
  r.view = std::max(r.view, me.acquired);
  meet(r, needed, site, [] {});
  me.acquired = std::max(me.acquired, r.view);
}

// One more poll has failed: others run first.
inline void spin(const char* site) {
  self().site = site;
  self().spins = true;
  yield();
}

}  // namespace emu
