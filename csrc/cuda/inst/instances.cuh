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
// Both directions of a cell with regularisers.
#define FASTRNN_REGULARISED(D, E, ...)                             \
  forward_entry<RegularisedCell, D, Tile<__VA_ARGS__>, E, true>(), \
      backward_entry<RegularisedCell, D, Tile<__VA_ARGS__>, E, true>(),
#define FASTRNN_REGULARISED_BF16(E, ...) FASTRNN_REGULARISED(Bf16, E, __VA_ARGS__)
#define FASTRNN_REGULARISED_FP16(E, ...) FASTRNN_REGULARISED(Fp16, E, __VA_ARGS__)
#define FASTRNN_REGULARISED_TF32(E, ...) FASTRNN_REGULARISED(Tf32, E, __VA_ARGS__)
#define FASTRNN_REGULARISED_BF16X3(E, ...) FASTRNN_REGULARISED(Bf16x3, E, __VA_ARGS__)
#define FASTRNN_REGULARISED_LIST(name, cell)                                                               \
  namespace fastrnn::cuda {                                                                                \
  KernelList name() {                                                                                      \
    using RegularisedCell = cell;                                                                          \
    static const Kernel all[] = {FASTRNN_TILES_16BIT_REGULARISED(FASTRNN_REGULARISED_BF16)                 \
                                     FASTRNN_TILES_16BIT_REGULARISED(FASTRNN_REGULARISED_FP16)             \
                                         FASTRNN_TILES_32BIT_REGULARISED(FASTRNN_REGULARISED_TF32)         \
                                             FASTRNN_TILES_32BIT_REGULARISED(FASTRNN_REGULARISED_BF16X3)}; \
    return {all, static_cast<int>(sizeof all / sizeof *all)};                                              \
  }                                                                                                        \
  }
