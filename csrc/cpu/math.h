// Activations on vectors. float: one polynomial exp for sigmoid and tanh, the same arithmetic on
// every instruction set with FMA, so AVX2 and AVX-512 agree to the bit. double: libm, lane by lane.
#pragma once
#include <cmath>

#include "simd.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// 2^t = 2^n (1 + q) for |t| <= 126: n = round(t) sits in the low bits of t + kMagic, q is a degree-6 polynomial
// (Cephes' exp2f, by Estrin's scheme) on [-1/2, 1/2]. t = x * scale, formed with one rounding.
// M independent arguments go through every instruction side by side: one after the other, their latencies
// (about 85 cycles each) fill the scheduler and the arithmetic units idle half the time.
template <class V, int M>
FASTRNN_INLINE void exp2_parts(V (&x)[M], const float (&scale)[M], V (&shifted)[M], V (&q)[M]) {
#define FASTRNN_EACH FASTRNN_UNROLL for (int i = 0; i < M; i++)
  const V magic = V::set1(12582912.f);
  V r[M], s[M], a[M], b[M];
  FASTRNN_EACH shifted[i] = V::fma(x[i], V::set1(scale[i]), magic);
  FASTRNN_EACH r[i] = magic - shifted[i];
  FASTRNN_EACH r[i] = V::fma(x[i], V::set1(scale[i]), r[i]);
  FASTRNN_EACH s[i] = r[i] * r[i];
  FASTRNN_EACH a[i] = V::fma(V::set1(1.535336188319500e-4f), r[i], V::set1(1.339887440266574e-3f));
  FASTRNN_EACH b[i] = V::fma(V::set1(9.618437357674640e-3f), r[i], V::set1(5.550332471162809e-2f));
  FASTRNN_EACH a[i] = V::fma(a[i], s[i], b[i]);
  FASTRNN_EACH b[i] = V::fma(V::set1(2.402264791363012e-1f), r[i], V::set1(6.931472028550421e-1f));
  FASTRNN_EACH a[i] = V::fma(a[i], s[i], b[i]);
  FASTRNN_EACH q[i] = a[i] * r[i];
}

// Clamps are written max(bound, x), min(bound, x): x86 returns the second operand when either is NaN, so NaN
// passes through.
// Sharp: for cells that divide by a spread and so enlarge the error of tanh.
template <class V, bool Linear, bool Sharp = false>
struct Act {
  using T = typename V::T;
#if defined(__AVX2__)
  static constexpr bool kVector = sizeof(T) == 4;
#else
  static constexpr bool kVector = false;
#endif
  template <class F>
  FASTRNN_INLINE V lanes(V x, F f) {
    T tmp[V::W];
    V::store(tmp, x);
    for (int i = 0; i < V::W; i++) tmp[i] = f(tmp[i]);
    return V::load(tmp);
  }
  // In place: s becomes its sigmoids, t its tanhs. tanh(x) = (e^2x - 1) / (e^2x + 1) with e^2x - 1 as
  // 2^n q + (2^n - 1), which keeps small arguments exact to an ulp or two. Sharp adds in first order what the quotient
  // and the sums above and below its line lost to rounding, without a second division: 1 / (e^2x + 1) is
  // (1 - tanh(x)) / 2. The error falls to that of torch's tanh; it costs small layers up to 15%.
  template <int NS, int NT>
  FASTRNN_INLINE void both(V (&s)[NS], V (&t)[NT]) {
    if constexpr (Linear) {
      for (V& x : s) x = V::fma(x, V::set1(T(0.25)), V::set1(T(0.5)));
    } else if constexpr (kVector) {
      constexpr int M = NS + NT;
      const V one = V::set1(1.f);
      V x[M], shifted[M], q[M], d[M], above[NT], below[NT], lost_above[NT], lost_below[NT];
      float scale[M];
      FASTRNN_EACH {
        const float limit = i < NS ? 87.f : 10.f;
        scale[i] = i < NS ? -1.44269504f : 2.88539008f;
        x[i] = V::max(V::set1(-limit), i < NS ? s[i % NS] : t[(i - NS) % NT]);
      }
      FASTRNN_EACH x[i] = V::min(V::set1(i < NS ? 87.f : 10.f), x[i]);
      exp2_parts(x, scale, shifted, q);
      FASTRNN_EACH {
        // 2^n alone is made in the exponent's bits: NaN comes in by q, whatever its own bits are.
        const V p = V::times2(one, shifted[i]);
        if (i < NS) {
          d[i] = one + V::fma(p, q[i], p);
        } else {
          const int k = (i - NS) % NT;
          const V less = p - one;
          x[i] = V::fma(p, q[i], less);
          d[i] = x[i] + V::set1(2.f);
          if constexpr (Sharp) {
            above[k] = x[i];
            below[k] = d[i];
            lost_above[k] = V::fma(p, q[i], less - x[i]);
            lost_below[k] = x[i] - (d[i] - V::set1(2.f)) + lost_above[k];
          }
        }
      }
      V::template quotients<NS, NT>(x, d);
      FASTRNN_EACH {
        if (i < NS) {
          s[i % NS] = d[i];
        } else if constexpr (Sharp) {
          const int k = (i - NS) % NT;
          V rest = V::fnma(below[k], d[i], above[k]) + lost_above[k];
          rest = V::fnma(d[i], lost_below[k], rest);
          rest = V::fma(rest, V::fnma(V::set1(0.5f), d[i], V::set1(0.5f)), d[i]);
          t[k] = V::min(one, rest);  // beyond 8.6 what was lost below is itself rounded
        } else {
          t[(i - NS) % NT] = d[i];
        }
      }
    } else {
      for (V& x : s) x = lanes(x, [](T v) { return T(1) / (T(1) + std::exp(-v)); });
      for (V& x : t) x = lanes(x, [](T v) { return std::tanh(v); });
    }
  }
  template <int NS>
  FASTRNN_INLINE void sigmoids(V (&s)[NS]) {
    V t[1] = {V::zero()};
    both(s, t);
  }
  template <int NT>
  FASTRNN_INLINE void tanhs(V (&t)[NT]) {
    if constexpr (Linear) return;
    V s[1] = {V::zero()};
    both(s, t);
  }
  FASTRNN_INLINE V sigmoid(V x) {
    V s[1] = {x};
    sigmoids(s);
    return s[0];
  }
  FASTRNN_INLINE V tanh(V x) {
    V t[1] = {x};
    tanhs(t);
    return t[0];
  }
  FASTRNN_INLINE V relu(V x) {
    if constexpr (Linear) return x;
    return V::max(V::zero(), x);
  }
  // Derivatives as functions of the activation's own output.
  FASTRNN_INLINE V dsigmoid(V s) {
    if constexpr (Linear) return V::set1(T(0.25));
    return s * (V::set1(T(1)) - s);
  }
  FASTRNN_INLINE V dtanh(V y) {
    if constexpr (Linear) return V::set1(T(1));
    return V::fnma(y, y, V::set1(T(1)));
  }
  FASTRNN_INLINE V drelu(V y, V g) {
    if constexpr (Linear) return g;
    T a[V::W], b[V::W];
    V::store(a, y);
    V::store(b, g);
    for (int i = 0; i < V::W; i++) b[i] = a[i] <= T(0) ? T(0) : b[i];  // as torch's, NaN lets gradients pass
    return V::load(b);
  }
  FASTRNN_INLINE V fma(V a, V b, V c) { return V::fma(a, b, c); }
  FASTRNN_INLINE V one() { return V::set1(T(1)); }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
