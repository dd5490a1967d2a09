// Shared memory with its shadow: every access is checked for range, for reading what nobody wrote, and for a second
// thread touching the same word with at least one write and no barrier between.
#pragma once
#include <cstring>

#include "machine.h"

namespace emu {

inline std::string text(const char* what, size_t offset) {
  return std::string(what) + " at shared byte " + std::to_string(offset);
}

// The word was touched by another thread since the barrier that both passed last.
inline bool unordered(int other, uint64_t block, uint64_t warp) {
  const Thread& me = self();
  if (other < 0 || other == static_cast<int>(me.index) || block != me.cta->barrier.generation) return false;
  return other / kWarp != static_cast<int>(me.index) / kWarp || warp == me.warp->sync.generation;
}

inline bool in_range(size_t offset, size_t bytes) {
  if (offset + bytes <= self().cta->shared.size()) return true;
  machine().fail(text("shared memory access out of range", offset));
  return false;
}

inline void shared_load(size_t offset, void* out, size_t bytes) {
  std::memset(out, 0xA5, bytes);
  if (!in_range(offset, bytes)) return;
  Thread& me = self();
  for (size_t w = offset / 4; w <= (offset + bytes - 1) / 4; w++) {
    Shadow& s = me.cta->shadow[w];
    if (!s.written) machine().fail(text("read of unwritten shared memory", w * 4));
    if (unordered(s.writer, s.write_block, s.write_warp))
      machine().fail(text("race: read after another thread's write", w * 4));
    const int warp = me.index / kWarp;
    const bool first = s.reader < 0 || s.read_block != me.cta->barrier.generation;
    s.reader_warp = first || s.reader_warp == warp ? warp : -1;
    s.reader = first || s.reader == static_cast<int>(me.index) ? static_cast<int>(me.index) : kManyReaders;
    s.read_block = me.cta->barrier.generation;
    s.read_warp = me.warp->sync.generation;
  }
  std::memcpy(out, me.cta->shared.data() + offset, bytes);
}

inline void shared_store(size_t offset, const void* in, size_t bytes) {
  if (!in_range(offset, bytes)) return;
  Thread& me = self();
  for (size_t w = offset / 4; w <= (offset + bytes - 1) / 4; w++) {
    Shadow& s = me.cta->shadow[w];
    if (unordered(s.writer, s.write_block, s.write_warp))
      machine().fail(text("race: two threads write", w * 4));
    const bool read_now = s.reader != -1 && s.reader != static_cast<int>(me.index) &&
                          s.read_block == me.cta->barrier.generation;
    const bool warp_ordered =
        s.reader_warp == static_cast<int>(me.index) / kWarp && s.read_warp < me.warp->sync.generation;
    if (read_now && !warp_ordered) machine().fail(text("race: write after another thread's read", w * 4));
    s.writer = me.index;
    s.write_block = me.cta->barrier.generation;
    s.write_warp = me.warp->sync.generation;
    s.written = true;
  }
  std::memcpy(me.cta->shared.data() + offset, in, bytes);
}

// An asynchronous copy writes at any moment between its issue and the wait: what is there in between is not the data, and
// both ends are checked as stores of the thread.
inline void copy_async(uint32_t offset, const void* from, size_t bytes) {
  const std::vector<uint8_t> poison(bytes, 0x7f);
  shared_store(offset, poison.data(), bytes);
  self().copies.back().push_back({offset, from, bytes});
}
inline void copy_commit() { self().copies.emplace_back(); }
inline void copy_wait(size_t pending) {
  std::vector<std::vector<AsyncCopy>>& groups = self().copies;
  while (groups.size() > pending + 1) {  // the open group has not been committed
    for (const AsyncCopy& c : groups.front()) {
      const std::vector<uint8_t> zeros(c.bytes, 0);
      shared_store(c.offset, c.from ? c.from : zeros.data(), c.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emu
