// A team of threads for one call, and the barrier its members meet at.
//
// The library links no OpenMP and loads none. Where torch has brought libgomp into the process, its
// workers are borrowed (two pools that spin against each other cost up to twice the time);
// elsewhere a small pool of our own parks when idle. docs/threads.md has the measurements.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

// This header is compiled for several instruction sets: what it defines must not be emitted as a function that
// the linker could keep in the wrong one's version.
#define FASTRNN_ALWAYS_INLINE inline __attribute__((always_inline))

namespace fastrnn {

// One member's share of a job. `nt` is the same for all members of a run. Must not throw.
using TeamJob = void (*)(int tid, int nt, void* arg);

// Runs job(tid, nt, arg) once for every tid in [0, nt) and returns when all are done; the caller is
// tid 0. 1 <= nt <= max(threads, 1). nt is 1, on the caller's thread, without any synchronisation,
// when threads <= 1 and when called from inside a job; it is also 1 when other runs already occupy
// the cores, so a result may not depend on nt. Safe to call from any number of threads, and after
// fork.
void team_run(int threads, TeamJob job, void* arg);

// team_run for a callable body(int tid, int nt).
template <class F>
void team(int threads, F&& body) {
  using Body = std::remove_reference_t<F>;
  const void* address = &body;
  team_run(
      threads, [](int tid, int nt, void* arg) noexcept { (*static_cast<Body*>(arg))(tid, nt); },
      const_cast<void*>(address));
}

// What a run would use now: "borrowed libgomp", "own pool" or "caller only".
const char* team_kind();

// Chooses the team for the runs that start later: "auto" (libgomp where it is loaded, else the own
// pool), "own", "gomp" or "caller". Throws std::invalid_argument for another word,
// std::runtime_error for "gomp" where libgomp is not loaded or the process was forked. The
// environment variable FASTRNN_TEAM sets the initial choice.
void team_configure(const char* kind);

// A barrier for the members of one run, usable any number of times.
class Barrier {
 public:
  Barrier() = default;
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;

  // Only while no thread waits; needed only when a run was abandoned between two waits.
  FASTRNN_ALWAYS_INLINE void reset() { state_.store(0, std::memory_order_relaxed); }

  // Returns when `count` threads have called wait since the last time it returned. What each of
  // them wrote before is visible to all of them after. Nothing at all for count <= 1.
  FASTRNN_ALWAYS_INLINE void wait(int count) {
    if (count > 1) meet(count);
  }

  // As wait(count); meanwhile work() is called again and again, until it returns false for want of any. Who comes last
  // waits for nobody: a piece of work that another thread is at holds up only that thread.
  template <class F>
  FASTRNN_ALWAYS_INLINE void wait(int count, F&& work) {
    if (count <= 1) return;
    const std::uint64_t phase = arrive(count);
    while (!passed(phase))
      if (!work()) return linger(count, phase);
  }

 private:
  void meet(int count);
  std::uint64_t arrive(int count);  // returns the phase that ends when all have arrived
  FASTRNN_ALWAYS_INLINE bool passed(std::uint64_t phase) const {
    return state_.load(std::memory_order_acquire) >> 32 != phase;
  }
  void linger(int count, std::uint64_t phase) const;

  // Phase in the high half, arrivals in the low half: one cache line travels instead of two (112
  // ns, not 274).
  alignas(64) std::atomic<std::uint64_t> state_{0};
};

}  // namespace fastrnn
