// Memory of large buffers, kept from one step of training to the next.
//
// A training step asks for tapes, scratch and gradients of megabytes and gives them back at its end, always the same. Memory from the
// system comes empty at every step, and filling in its pages costs up to a quarter of a step. What is given back here stays mapped and
// is handed out again; never more than was in use at once, and of what lies idle never more than a limit.
#pragma once
#include <cstddef>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace fastrnn {

class LargeMemory {
 public:
  // The one of the process, never destroyed: tensors may outlive everything else.
  static LargeMemory& get();

  void* take(size_t bytes);  // in whole pages; null where the system gives none
  void give(void* at);
  void limit(size_t idle);  // bytes that may lie idle; 0 turns keeping off, so that everything goes back
  struct Figures {
    size_t used, idle, limit;
  };
  Figures figures();

 private:
  static constexpr size_t kGrain = size_t{64} << 10;      // what a buffer's size is rounded up to
  static constexpr size_t kReserved = size_t{512} << 20;  // addresses asked for at a time: they cost nothing
  using Free = std::map<char*, size_t>;                   // by address, neighbours merged

  LargeMemory();
  Free::iterator fitting(size_t size);
  bool grow(size_t size);
  void insert(char* at, size_t size);
  size_t touch(char* at, size_t size);
  void drop(size_t bytes);
  std::vector<bool>& pages_of(char* at, char*& base);

  std::mutex mutex_;
  std::map<char*, std::vector<bool>> segments_;  // of each grain, whether it may hold pages
  Free free_;
  std::unordered_map<void*, size_t> used_;
  size_t used_bytes_ = 0, most_ = 0, resident_ = 0, limit_ = size_t{512} << 20;
};

}  // namespace fastrnn
