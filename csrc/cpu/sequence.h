// Which rows are alive at which step, and where they lie: dense, time- or batch-major, packed, with
// lengths or resets, seen the same way by the forward and backward drivers.
#pragma once
#include "layer.h"
#include "pack.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fastrnn {
namespace FASTRNN_ISA {

// Carves typed, 64-byte aligned pieces out of one buffer; with base null it only adds up sizes.
// Under AddressSanitizer pieces are apart, and what is between them must not be touched.
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <class T>
  T* take(size_t n) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
#if defined(__SANITIZE_ADDRESS__)
    const size_t end = used + n * sizeof(T);
    used = align64(end) + 64;
    if (base) __asan_poison_memory_region(base + end, used - end);
#else
    used += align64(n * sizeof(T));
#endif
    return p;
  }
};

struct Sequence {
  const Problem* p = nullptr;
  int64_t* offsets = nullptr;         // packed: first row of each step, T + 1
  int64_t* packed_lengths = nullptr;  // packed: steps of each row

  Sequence(const Problem& problem, Arena& arena) : p(&problem) {
    if (!problem.batch_sizes) return;
    offsets = arena.take<int64_t>(problem.T + 1);
    packed_lengths = arena.take<int64_t>(problem.N);
    if (!arena.base) return;
    offsets[0] = 0;
    for (int64_t n = 0; n < problem.N; n++) packed_lengths[n] = 0;
    for (int64_t t = 0; t < problem.T; t++) {
      offsets[t + 1] = offsets[t] + problem.batch_sizes[t];
      for (int64_t n = problem.batch_sizes[t]; n-- > 0 && packed_lengths[n] == t;) packed_lengths[n] = t + 1;
    }
  }
  bool ragged() const { return offsets || p->lengths; }
  // Clamped to 1..T: under torch.compile the values cannot be checked before they arrive here.
  int64_t length(int64_t n) const {
    if (offsets) return packed_lengths[n];
    return p->lengths ? imax(1, imin(p->T, p->lengths[n])) : p->T;
  }
  // Rows that may be alive at t: [0, count(t)); each still has to pass alive().
  int64_t count(int64_t t) const { return offsets ? p->batch_sizes[t] : p->N; }
  bool alive(int64_t t, int64_t n) const { return !p->lengths || t < length(n); }
  bool resets(int64_t t, int64_t n) const {
    return p->reset && p->reset[t * p->reset_stride_t + n * p->reset_stride_n];
  }
  // Row (t, n) of a tensor; index(t, n) its number in a tape of T * N (or packed) rows.
  template <class T>
  T* at(const Grid& g, int64_t t, int64_t n) const {
    int64_t first = offsets ? offsets[t] * g.stride_n : t * g.stride_t;
    return static_cast<T*>(g.data) + first + n * g.stride_n;
  }
  int64_t index(int64_t t, int64_t n) const { return (offsets ? offsets[t] : t * p->N) + n; }
  int64_t rows() const { return offsets ? offsets[p->T] : p->T * p->N; }
};

// Rows of a run of steps in processing order, for one thread's share [n0, n1) of the batch.
struct RowList {
  int32_t* n = nullptr;      // batch index of each row
  int64_t* start = nullptr;  // first row of each step of the chunk, steps + 1
  int64_t rows = 0;

  RowList(Arena& arena, int64_t steps, int64_t width)
      : n(arena.take<int32_t>(steps * width)), start(arena.take<int64_t>(steps + 1)) {}

  // Step i of the chunk is at time(i).
  template <class Time>
  void fill(const Sequence& seq, int64_t steps, int64_t n0, int64_t n1, Time&& time) {
    rows = 0;
    for (int64_t i = 0; i < steps; i++) {
      start[i] = rows;
      const int64_t t = time(i), end = imin(n1, seq.count(t));
      for (int64_t r = n0; r < end; r++)
        if (seq.alive(t, r)) n[rows++] = static_cast<int32_t>(r);
    }
    start[steps] = rows;
  }
  int64_t count(int64_t i) const { return start[i + 1] - start[i]; }
};

// How a layer's work is spread over threads. Directions first, then units or rows inside one.
struct Share {
  int direction_first, direction_last;  // directions this thread works on
  int id, count;                        // its place in that direction's group

  // Its share of n: [first(n), last(n)).
  int64_t first(int64_t n) const { return n * id / count; }
  int64_t last(int64_t n) const { return n * (id + 1) / count; }

  Share(int directions, int tid, int nt) {
    if (directions == 1 || nt == 1) {
      direction_first = 0;
      direction_last = directions;
      id = tid;
      count = nt;
    } else {
      const int half = (nt + 1) / 2;
      direction_first = tid < half ? 0 : 1;
      direction_last = direction_first + 1;
      id = tid < half ? tid : tid - half;
      count = tid < half ? half : nt - half;
    }
  }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
