// Global memory as weak as PTX allows.
//
// A relaxed store waits in its CTA's queue and becomes visible late and in any order, except that one word's stores keep
// theirs. A release makes visible first whatever is ordered before it: the thread's own stores and those before a barrier that
// the thread has passed. A relaxed load may still see what a word was before its last change, until the thread has
// acquired something later, itself or through a barrier; a thread that has seen a change does not go back.
#pragma once
#include <cstring>

#include "machine.h"

namespace emu {

inline void apply(const PendingStore& s, const Cta& cta) {
  Machine& m = machine();
  m.events++;
  Change& c = m.changes[s.address];
  c = {*s.address, c.event, m.events, cta.index};
  *s.address = s.value;
}

// Makes entry i visible, after older stores to the same word.
inline void drain(Cta& cta, size_t i) {
  std::vector<PendingStore>& queue = cta.queue;
  const uint32_t* address = queue[i].address;
  for (size_t k = 0; k <= i;) {
    if (queue[k].address != address) {
      k++;
      continue;
    }
    apply(queue[k], cta);
    queue.erase(queue.begin() + k);
    if (i-- == k) return;
  }
}

inline void drain_some(Cta& cta, size_t most) {
  Random& random = machine().random;
  for (size_t n = random.below(most + 1); n > 0 && !cta.queue.empty(); n--)
    drain(cta, random.below(cta.queue.size()));
}

inline void store_relaxed(uint32_t* address, uint32_t value) {
  constexpr size_t kQueue = 96;
  Thread& me = self();
  Cta& cta = *me.cta;
  cta.queue.push_back(
      {address, value, me.index, me.index / kWarp, cta.barrier.generation, me.warp->sync.generation});
  if (cta.queue.size() > kQueue) drain(cta, machine().random.below(kQueue));
}

inline void store_release(uint32_t* address, uint32_t value) {
  Thread& me = self();
  Cta& cta = *me.cta;
  for (size_t i = 0; i < cta.queue.size();) {
    const PendingStore& s = cta.queue[i];
    const bool ordered = s.thread == me.index || s.block_epoch < cta.barrier.generation ||
                         (s.warp == me.index / kWarp && s.warp_epoch < me.warp->sync.generation);
    if (ordered) {
      drain(cta, i);
      i = 0;
    } else {
      i++;
    }
  }
  store_relaxed(address, value);
}

// One word; `event` is when it got the value that is returned. A CTA sees its own stores at once.
inline uint32_t load_word(const uint32_t* address, uint64_t* event) {
  Machine& m = machine();
  Thread& me = self();
  uint32_t value = *address;
  *event = 0;
  const auto found = m.changes.find(address);
  if (found != m.changes.end()) {
    const Change& c = found->second;
    uint64_t& seen = me.seen_changes[address];
    const bool may_be_stale = c.cta != me.cta->index && c.event > me.acquired && c.event != seen;
    if (may_be_stale && m.random.below(4) == 0) {
      value = c.old;
      *event = c.old_event;
    } else {
      *event = seen = c.event;
    }
  }
  for (const PendingStore& s : me.cta->queue)
    if (s.address == address) value = s.value;
  return value;
}

inline void load_relaxed(const void* address, uint32_t* out, int words) {
  uint64_t event;
  for (int i = 0; i < words; i++) out[i] = load_word(static_cast<const uint32_t*>(address) + i, &event);
}

inline uint32_t load_acquire(const uint32_t* address) {
  uint64_t event;
  const uint32_t value = load_word(address, &event);
  self().acquired = std::max(self().acquired, event);
  return value;
}

}  // namespace emu
