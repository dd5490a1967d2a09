// The Recurrent Highway Network's tape: the activated gates of every micro-step, D depth rows G H of them.
#pragma once
#include "plan.h"
#include "rhn.h"
#include "sequence.h"

namespace fastrnn {
namespace FASTRNN_ISA {

constexpr int64_t kTapeGroup = 16, kOneGroup = int64_t(1) << 62;  // powers of two
constexpr int64_t kStreamedTape = 16 << 20;  // bytes of which caches keep little until the backward

// The gates of all rows of one time step after one micro-step. Those of `group` units lie together, [row][gate][unit]: what a tile
// meets is then a few runs of whole cache lines, and not pieces of every row. The last group has the units that are left, so
// there is no padding; where all are one group the gates of a row follow each other.
template <class T>
struct RhnTape {
  T* data = nullptr;
  int64_t group = kOneGroup, rows = 0, gates = 0, H = 0;
  struct Place {
    T* first;           // of row 0 and gate 0
    int64_t row, gate;  // from one to the next
  };
  Place of(int64_t unit) const {
    const int64_t before = unit & -group, width = imin(group, H - before);
    return {data + before * rows * gates + unit - before, gates * width, width};
  }
};

// A layer's. The layout depends on sizes alone: threads and partition may have changed by the backward.
template <class T>
class RhnTapes {
 public:
  RhnTapes(const RhnProblem& p, const Sequence& seq)
      : p_(p),
        seq_(seq),
        large_(int64_t(sizeof(T)) * p.directions * p.depth * seq.rows() * p.gates * p.H >= kStreamedTape),
        // Threads that own rows would share the runs, and what the hardware fetches beyond their own: not worth it in L2.
        group_(p.N >= 4 && (large_ || double(sizeof(T)) * p.depth * p.gates * p.H * p.H > kStaysInL2)
                   ? kTapeGroup
                   : kOneGroup) {}

  // Of micro-step l of time step t; null stays null.
  RhnTape<T> at(const void* tape, int d, int64_t l, int64_t t) const {
    const int64_t row = (d * p_.depth + l) * seq_.rows() + seq_.index(t, 0);
    return {tape ? static_cast<T*>(const_cast<void*>(tape)) + row * p_.gates * p_.H : nullptr, group_,
            seq_.count(t), p_.gates, p_.H};
  }
  // Whether vectors of whole groups are cache lines that go past the caches.
  template <class V>
  bool streams(const RhnTape<T>& tape) const {
    return large_ && tape.data && streamable<V>(tape.data);
  }

 private:
  const RhnProblem& p_;
  const Sequence& seq_;
  const bool large_;
  const int64_t group_;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
