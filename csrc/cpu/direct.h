// Products with a weight matrix where it lies, for a backward that uses it once: packing it would cost more.
#pragma once
#include "pack.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// With more rows than these the micro-kernel's packed panels win. With 32 registers 128 rows are the most that were measured.
constexpr int64_t kDirectRows = kRegisters == 32 ? 128 : 12;

// Where the columns of thread `id` begin, in whole cache lines.
FASTRNN_INLINE int64_t first_column(int64_t width, int id, int count) {
  return id == count ? width : width * id / count / 16 * 16;
}

// out[m][c] = sum_k a[m][k] * w[k][c] (+ out[m][c] if add) for columns [c0, c1) of w (K x ld, as stored): one FMA chain in
// the order of k, as in the micro-kernel. A group of rows of w stays in L1 while all m meet it: 16 multipliers in
// registers, one load of w an FMA, and w itself is streamed once.
template <class E>
static void direct_product(const typename E::T* const* a, int64_t M, const typename E::IO* w, int64_t ld,
                           int64_t K, int64_t c0, int64_t c1, typename E::T* out, int64_t out_stride,
                           bool add) {
  using V = typename E::V;
  constexpr int kGroup = kRegisters == 32 ? 16 : 8;
  constexpr int kWide = 4;
  constexpr int64_t kColumns = 512;  // 32 KiB of w in L1
  for (; c0 < c1; c0 += kColumns) {
    const int64_t end = imin(c1, c0 + kColumns);
    for (int64_t k = 0; k < K; k += kGroup) {
      const int group = static_cast<int>(imin(kGroup, K - k));
      const typename E::IO* rows = w + k * ld;
      for (int64_t m = 0; m < M; m++) {
        V x[kGroup];
        FASTRNN_UNROLL for (int i = 0; i < kGroup; i++) x[i] = i < group ? V::set1(a[m][k + i]) : V::zero();
        typename E::T* o = out + m * out_stride;
        const bool start = k == 0 && !add;
        int64_t c = c0;
        if (group == kGroup)
          for (; c + kWide * V::W <= end; c += kWide * V::W) {  // chains side by side hide their latency
            V acc[kWide];
            FASTRNN_UNROLL for (int v = 0; v < kWide; v++) acc[v] =
                start ? V::zero() : V::load(o + c + v * V::W);
            FASTRNN_UNROLL for (int i = 0; i < kGroup; i++) FASTRNN_UNROLL for (int v = 0; v < kWide; v++)
                acc[v] = V::fma(x[i], load_as<V>(rows + i * ld + c + v * V::W, V::W), acc[v]);
            FASTRNN_UNROLL for (int v = 0; v < kWide; v++) V::store(o + c + v * V::W, acc[v]);
          }
        for (; c < end; c += V::W) {
          const int n = static_cast<int>(imin(V::W, end - c));
          V acc = start ? V::zero() : load_as<V>(o + c, n);
          for (int i = 0; i < group; i++) acc = V::fma(x[i], load_as<V>(rows + i * ld + c, n), acc);
          store_as<V>(o + c, acc, n);
        }
      }
    }
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
