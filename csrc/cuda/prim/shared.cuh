// Shared memory as typed views: base + offset on a GPU; range, race and first-write checks in the emulator.
#pragma once
#include "platform.cuh"

namespace fastrnn::cuda::prim {

#if defined(FASTRNN_EMU)

template <class T>
struct Shared {
  uint32_t offset, count;  // bytes, elements
  FASTRNN_DEVICE T load(int i) const {
    T v;
    emu::shared_load(address(i), &v, sizeof(T));
    return v;
  }
  FASTRNN_DEVICE void store(int i, T v) const { emu::shared_store(address(i), &v, sizeof(T)); }
  FASTRNN_DEVICE uint32_t address(int i) const {
    if (i < 0 || i >= static_cast<int>(count)) emu::machine().fail("shared array index out of range");
    return offset + i * sizeof(T);
  }
};
template <class T>
FASTRNN_DEVICE Shared<T> shared_view(int offset, int count) {
  return {static_cast<uint32_t>(offset), static_cast<uint32_t>(count)};
}
FASTRNN_DEVICE void copy_async(const Shared<Vec4>& to, int i, const void* from, bool exists) {
  emu::copy_async(to.address(i), exists ? from : nullptr, sizeof(Vec4));
}
FASTRNN_DEVICE void copy_commit() { emu::copy_commit(); }
template <int Pending>
FASTRNN_DEVICE void copy_wait() {
  emu::copy_wait(Pending);
}

#else

template <class T>
struct Shared {
  T* data;
  FASTRNN_DEVICE T load(int i) const { return data[i]; }
  FASTRNN_DEVICE void store(int i, T v) const { data[i] = v; }
  FASTRNN_DEVICE uint32_t address(int i) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(data + i));
  }
};
template <class T>
FASTRNN_DEVICE Shared<T> shared_view(int offset, int) {
  extern __shared__ __align__(16) unsigned char fastrnn_shared[];
  return {reinterpret_cast<T*>(fastrnn_shared + offset)};
}
// 16 bytes from global memory, behind the thread's back; zeros where `exists` is false, and then nothing is read.
FASTRNN_DEVICE void copy_async(const Shared<Vec4>& to, int i, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address(i)), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}
// The thread's copies so far are one group. It waits until all groups but the last `Pending` are there: for itself, a
// barrier afterwards tells the others.
FASTRNN_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
FASTRNN_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

#endif

}  // namespace fastrnn::cuda::prim
