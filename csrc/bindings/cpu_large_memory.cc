#include "large_memory.h"

#include <algorithm>
#include <memory>

#include "../cpu/pages.h"
#include "args.h"
#include "dlpack.h"
#if defined(__linux__)
#include <pthread.h>
#endif

namespace fastrnn {

namespace py = pybind11;

LargeMemory& LargeMemory::get() {
  static LargeMemory* const one = new LargeMemory;
  return *one;
}

LargeMemory::LargeMemory() {
#if defined(__linux__)
  // A child of a fork must not find the lock taken by a thread that it does not have.
  pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
#endif
}

// The smallest that is large enough.
LargeMemory::Free::iterator LargeMemory::fitting(size_t size) {
  auto best = free_.end();
  for (auto it = free_.begin(); it != free_.end(); ++it)
    if (it->second >= size && (best == free_.end() || it->second < best->second)) best = it;
  return best;
}

bool LargeMemory::grow(size_t size) {
#if defined(__linux__)
  for (const size_t ask : {std::max(size, kReserved), size}) {
    void* const at =
        mmap(nullptr, ask, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) continue;
    segments_[static_cast<char*>(at)].resize(ask / kGrain);
    insert(static_cast<char*>(at), ask);
    return true;
  }
#endif
  (void)size;
  return false;
}

void LargeMemory::insert(char* at, size_t size) {
  auto it = free_.emplace(at, size).first;
  const auto next = std::next(it);
  if (next != free_.end() && at + size == next->first && !segments_.count(next->first)) {
    it->second += next->second;
    free_.erase(next);
  }
  if (it == free_.begin() || segments_.count(at)) return;
  const auto before = std::prev(it);
  if (before->first + before->second != at) return;
  before->second += it->second;
  free_.erase(it);
}

std::vector<bool>& LargeMemory::pages_of(char* at, char*& base) {
  const auto segment = std::prev(segments_.upper_bound(at));
  base = segment->first;
  return segment->second;
}

// Marks the grains of a buffer; how many bytes of them had no pages.
size_t LargeMemory::touch(char* at, size_t size) {
  char* base;
  auto& pages = pages_of(at, base);
  size_t missing = 0;
  for (size_t g = (at - base) / kGrain, end = g + size / kGrain; g < end; g++) {
    missing += pages[g] ? 0 : kGrain;
    pages[g] = true;
  }
  return missing;
}

// Gives the system so many bytes of what lies idle, or all of that.
void LargeMemory::drop(size_t bytes) {
#if defined(__linux__)
  for (auto it = free_.rbegin(); it != free_.rend() && bytes; ++it) {
    char* base;
    auto& pages = pages_of(it->first, base);
    const size_t first = (it->first - base) / kGrain;
    for (size_t end = first + it->second / kGrain; end > first && bytes;) {
      if (!pages[end - 1]) {
        end--;
        continue;
      }
      size_t begin = end;
      for (; begin > first && pages[begin - 1] && bytes; begin--) {
        pages[begin - 1] = false;
        resident_ -= kGrain;
        bytes -= std::min(bytes, kGrain);
      }
      (void)madvise(base + begin * kGrain, (end - begin) * kGrain, MADV_DONTNEED);
      end = begin;
    }
  }
#endif
  (void)bytes;
}

void* LargeMemory::take(size_t bytes) {
  const size_t size = (bytes + kGrain - 1) / kGrain * kGrain;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!limit_ || !size) return nullptr;
  auto it = fitting(size);
  if (it == free_.end()) {
    if (!grow(size)) return nullptr;
    it = fitting(size);
  }
  char* const at = it->first;
  const size_t left = it->second - size;
  free_.erase(it);
  if (left) free_.emplace(at + size, left);
  used_[at] = size;
  used_bytes_ += size;
  most_ = std::max(most_, used_bytes_);
  const size_t missing = touch(at, size);
  resident_ += missing;
  if (missing) prefer_huge_pages(at, size);
  if (resident_ > most_) drop(resident_ - most_);
  return at;
}

void LargeMemory::give(void* at) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = used_.find(at);
  if (it == used_.end()) return;
  const size_t size = it->second;
  used_.erase(it);
  used_bytes_ -= size;
  insert(static_cast<char*>(at), size);
  if (resident_ > used_bytes_ + limit_) drop(resident_ - used_bytes_ - limit_);
}

void LargeMemory::limit(size_t idle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  limit_ = idle;
  if (resident_ > used_bytes_ + idle) drop(resident_ - used_bytes_ - idle);
}

LargeMemory::Figures LargeMemory::figures() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {used_bytes_, resident_ - used_bytes_, limit_};
}

namespace {

struct Held {
  DLManagedTensor managed;
  std::vector<int64_t> sizes;
};

void give_back(DLManagedTensor* managed) {
  LargeMemory::get().give(managed->dl_tensor.data);
  delete static_cast<Held*>(managed->manager_ctx);
}

// A dense tensor as a DLPack capsule, or None where there is no memory to keep.
py::object kept_tensor(const py::tuple& shape, uint8_t code, uint8_t bits) {
  auto held = std::make_unique<Held>();
  size_t bytes = bits / 8;
  for (const auto& each : shape) {
    held->sizes.push_back(each.cast<int64_t>());
    bytes *= held->sizes.back();
  }
  void* const at = LargeMemory::get().take(bytes);
  if (!at) return py::none();
  DLTensor& t = held->managed.dl_tensor;
  t = {at, {1, 0}, static_cast<int32_t>(held->sizes.size()), {code, bits, 1}, held->sizes.data(), nullptr, 0};
  held->managed.manager_ctx = held.get();
  held->managed.deleter = give_back;
  // Whoever takes the tensor over renames the capsule.
  PyObject* capsule = PyCapsule_New(&held->managed, "dltensor", [](PyObject* self) {
    if (!PyCapsule_IsValid(self, "dltensor")) return;
    auto* const managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, "dltensor"));
    managed->deleter(managed);
  });
  if (!capsule) {
    LargeMemory::get().give(at);
    throw py::error_already_set();
  }
  held.release();
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

void bind_large_memory(py::module_& m) {
  m.def("kept_tensor", kept_tensor);
  m.def("keep_memory", [](size_t idle) { LargeMemory::get().limit(idle); });
  m.def("kept_memory", [] {
    const auto figures = LargeMemory::get().figures();
    return py::make_tuple(figures.used, figures.idle, figures.limit);
  });
}

}  // namespace fastrnn
