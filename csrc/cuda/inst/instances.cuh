// A cell's kernels of one direction, for all formats and tiles: taking their addresses compiles them.
#pragma once
#include "../core/backward.cuh"
#include "../core/forward.cuh"
#include "../kernels.h"
#include "../tiles.h"

namespace fastrnn::cuda {

template <template <class, class, int> class E>
struct KindOf;
template <>
struct KindOf<Sentinel> {
  static constexpr ExchangeKind value = ExchangeKind::sentinel;
};
template <>
struct KindOf<Flags> {
  static constexpr ExchangeKind value = ExchangeKind::flags;
};
template <>
struct KindOf<Local> {
  static constexpr ExchangeKind value = ExchangeKind::local;
};
template <>
struct KindOf<Cluster> {
  static constexpr ExchangeKind value = ExchangeKind::cluster;
};

template <class Cell, class D, class T, template <class, class, int> class E, bool kNoisy = false>
Kernel forward_entry() {
  return {Cell::kKind,
          false,
          D::kFormat,
          KindOf<E>::value,
          T::kShape,
          Forward<Cell, D, T, E>::kLayout.bytes,
          reinterpret_cast<const void*>(&forward_kernel<Cell, D, T, E, false, kNoisy>),
          kNoisy};
}
template <class Cell, class D, class T, template <class, class, int> class E, bool kNoisy = false>
Kernel backward_entry() {
  return {Cell::kKind,
          true,
          D::kFormat,
          KindOf<E>::value,
          T::kShape,
          Backward<Cell, D, T, E>::kLayout.bytes,
          reinterpret_cast<const void*>(&backward_kernel<Cell, D, T, E, false, kNoisy>),
          kNoisy};
}

}  // namespace fastrnn::cuda

#define FASTRNN_ENTRY_BF16(E, ...) FASTRNN_ENTRY(Bf16, E, __VA_ARGS__)
#define FASTRNN_ENTRY_FP16(E, ...) FASTRNN_ENTRY(Fp16, E, __VA_ARGS__)
#define FASTRNN_ENTRY_TF32(E, ...) FASTRNN_ENTRY(Tf32, E, __VA_ARGS__)
#define FASTRNN_ENTRY_BF16X3(E, ...) FASTRNN_ENTRY(Bf16x3, E, __VA_ARGS__)
#define FASTRNN_ENTRIES                   \
  FASTRNN_TILES_16BIT(FASTRNN_ENTRY_BF16) \
  FASTRNN_TILES_16BIT(FASTRNN_ENTRY_FP16) \
  FASTRNN_TILES_32BIT(FASTRNN_ENTRY_TF32) FASTRNN_TILES_32BIT(FASTRNN_ENTRY_BF16X3)
// Defines the list `name`; FASTRNN_ENTRY says which kernel of which cell.
#define FASTRNN_KERNEL_LIST(name)                             \
  namespace fastrnn::cuda {                                   \
  KernelList name() {                                         \
    static const Kernel all[] = {FASTRNN_ENTRIES};            \
    return {all, static_cast<int>(sizeof all / sizeof *all)}; \
  }                                                           \
  }
// The same with the tiles of some kernels only; FASTRNN_ENTRY may make several of one.
#define FASTRNN_FEW_ENTRIES(kind)                                                               \
  FASTRNN_TILES_16BIT_##kind(FASTRNN_ENTRY_BF16) FASTRNN_TILES_16BIT_##kind(FASTRNN_ENTRY_FP16) \
      FASTRNN_TILES_32BIT_##kind(FASTRNN_ENTRY_TF32) FASTRNN_TILES_32BIT_##kind(FASTRNN_ENTRY_BF16X3)
#define FASTRNN_SHORT_KERNEL_LIST(name, kind)                 \
  namespace fastrnn::cuda {                                   \
  KernelList name() {                                         \
    static const Kernel all[] = {FASTRNN_FEW_ENTRIES(kind)};  \
    return {all, static_cast<int>(sizeof all / sizeof *all)}; \
  }                                                           \
  }
// Both directions of a cell with regularisers.
#define FASTRNN_REGULARISED(cell, D, E, ...) \
  forward_entry<cell, D, Tile<__VA_ARGS__>, E, true>(), backward_entry<cell, D, Tile<__VA_ARGS__>, E, true>(),
