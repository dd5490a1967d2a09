// Global memory as weak as PTX allows for stores: a relaxed store waits in its CTA's queue, word by word, and becomes
// visible late and in any order, except that one word's stores keep theirs. A release makes visible first whatever
// is ordered before it: the thread's own stores and those before a barrier that the thread has passed.
#pragma once
#include <cstring>

#include "machine.h"

namespace emu {

inline void apply(const PendingStore& s) {
  std::memcpy(s.address, &s.value, s.bytes);
  machine().events++;
}

inline bool same_word(const PendingStore& a, const PendingStore& b) {
  return reinterpret_cast<uintptr_t>(a.address) / 4 == reinterpret_cast<uintptr_t>(b.address) / 4;
}

// Makes entry i visible, after older stores to the same word.
inline void drain(std::vector<PendingStore>& queue, size_t i) {
  for (size_t k = 0; k <= i; k++) {
    if (!same_word(queue[k], queue[i])) continue;
    apply(queue[k]);
    queue.erase(queue.begin() + k);
    if (k == i) return;
    k--, i--;
  }
}

inline void drain_some(Cta& cta, size_t most) {
  Random& random = machine().random;
  for (size_t n = random.below(most + 1); n > 0 && !cta.queue.empty(); n--)
    drain(cta.queue, random.below(cta.queue.size()));
}

inline void store_relaxed(void* address, uint32_t value, int bytes) {
  constexpr size_t kQueue = 96;
  Thread& me = self();
  const PendingStore s{
      static_cast<char*>(address), value, bytes, me.index, me.index / kWarp, me.cta->barrier.generation,
      me.warp->sync.generation};
  if (!machine().config.weak_memory) return apply(s);
  me.cta->queue.push_back(s);
  if (me.cta->queue.size() > kQueue) drain(me.cta->queue, machine().random.below(kQueue));
}

inline void store_release(void* address, uint32_t value) {
  Thread& me = self();
  std::vector<PendingStore>& queue = me.cta->queue;
  for (size_t i = 0; i < queue.size();) {
    const PendingStore& s = queue[i];
    const bool ordered = s.thread == me.index || s.block_epoch < me.cta->barrier.generation ||
                         (s.warp == me.index / kWarp && s.warp_epoch < me.warp->sync.generation);
    if (ordered) {
      drain(queue, i);
      i = 0;
    } else {
      i++;
    }
  }
  store_relaxed(address, value, 4);
}

// Reads `words` words; a CTA sees its own stores at once.
inline void load(const void* address, uint32_t* out, int words) {
  std::memcpy(out, address, words * 4);
  const char* begin = static_cast<const char*>(address);
  for (const PendingStore& s : self().cta->queue) {
    const ptrdiff_t at = s.address - begin;
    if (at >= 0 && at + s.bytes <= words * 4)
      std::memcpy(reinterpret_cast<char*>(out) + at, &s.value, s.bytes);
  }
}

}  // namespace emu
