// Thread block clusters: a CTA pushes words into a peer's shared memory, whose mbarrier counts the bytes that came.
#pragma once
#include <cstring>

#include "machine.h"

namespace emu {

inline unsigned cluster_rank() { return self().cta->index % machine().config.cluster; }

inline Cta& cluster_peer(unsigned rank) {
  const unsigned size = machine().config.cluster;
  return machine().ctas[self().cta->index / size * size + rank];
}

inline void cluster_barrier(const char* site) { meet(self().cluster->barrier, self().cluster->live, site); }

inline TransactionBarrier& mbarrier(Cta& cta, int index) {
  if (cta.mbarriers.size() <= static_cast<size_t>(index)) cta.mbarriers.resize(index + 1);
  return cta.mbarriers[index];
}

inline void settle(TransactionBarrier& b) {
  if (b.pending || b.pending_bytes) return;
  b.phase++;
  b.pending = b.count;
  machine().events++;
}

inline void mbarrier_init(int index, int count) {
  TransactionBarrier& b = mbarrier(*self().cta, index);
  b = {0, count, count, 0, true};
}

inline void mbarrier_arrive_expect(int index, uint32_t bytes) {
  TransactionBarrier& b = mbarrier(*self().cta, index);
  if (!b.live) machine().fail("arrive at an mbarrier that was not initialised");
  b.pending_bytes += bytes;
  b.pending--;
  settle(b);
}

inline bool mbarrier_passed(int index, uint32_t parity) {
  return (mbarrier(*self().cta, index).phase & 1) != (parity & 1);
}

inline void store_async(unsigned rank, uint32_t offset, uint32_t value, int index) {
  machine().flying.push_back({&cluster_peer(rank), offset, value, index});
}

// Delivered words are ordered by the mbarrier, so the shadow takes them as written by nobody.
inline void deliver_some(Machine& m, size_t most) {
  for (size_t n = m.random.below(most * 8 + 1); n > 0 && !m.flying.empty(); n--) {
    const size_t i = m.random.below(m.flying.size());
    const AsyncStore s = m.flying[i];
    m.flying[i] = m.flying.back();
    m.flying.pop_back();
    TransactionBarrier& b = mbarrier(*s.to, s.mbarrier);
    if (!b.live || !s.to->live) {
      m.error =
          "push to CTA " + std::to_string(s.to->index) + " before its mbarrier was set up or after its end";
      return;
    }
    std::memcpy(s.to->shared.data() + s.offset, &s.value, 4);
    Shadow& shadow = s.to->shadow[s.offset / 4];
    if (shadow.reader >= 0 && shadow.read_block == s.to->barrier.generation)
      m.error = "race: push over what CTA " + std::to_string(s.to->index) + " reads, at shared byte " +
                std::to_string(s.offset);
    shadow.writer = -1;
    shadow.written = true;
    b.pending_bytes -= 4;
    m.events++;
    settle(b);
  }
}

}  // namespace emu
