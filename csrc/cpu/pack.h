// Weight layouts. A `Panels` splits `width` units of `gates` gates into blocks of U units; block b is
// one contiguous stream [k][gates * w] for the micro-kernel (gate g of unit u in column g * w + u), or two such
// strips of half the columns (microkernel.h).
// Gates of a narrow last block are packed densely, so an odd width wastes less than one vector.
#pragma once
#include <type_traits>

#include "layer.h"
#include "microkernel.h"

namespace fastrnn {
namespace FASTRNN_ISA {

FASTRNN_INLINE int64_t imin(int64_t a, int64_t b) { return a < b ? a : b; }
FASTRNN_INLINE int64_t imax(int64_t a, int64_t b) { return a > b ? a : b; }
FASTRNN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTRNN_INLINE size_t align64(size_t n) { return (n + 63) / 64 * 64; }

template <class E>
struct Panels {
  int gates = 0;
  int64_t width = 0, unit = 0, blocks = 0;
  Panels() = default;
  // `vectors`: columns of a block, in vectors.
  Panels(int g, int64_t w, int vectors = kMaxVectors)
      : gates(g), width(w), unit(E::W * (vectors / g)), blocks(ceil_div(w, unit)) {}
  int64_t first(int64_t b) const { return b * unit; }
  int units(int64_t b) const { return static_cast<int>(imin(unit, width - b * unit)); }
  int vectors(int64_t b) const { return static_cast<int>(ceil_div(gates * units(b), E::W)); }
  int64_t columns(int64_t b) const { return vectors(b) * E::W; }
  int64_t offset(int64_t b) const { return b * unit * gates; }  // columns before block b
  int64_t total() const { return blocks ? offset(blocks - 1) + columns(blocks - 1) : 0; }
  size_t elements(int64_t K) const { return total() * (ceil_div(K, E::kPair) * E::kPair); }
  // Start of block b's stream, at row k (a multiple of kPair; of a block of one strip), in a buffer packed with K rows.
  int64_t stream(int64_t b, int64_t K, int64_t k = 0) const {
    return offset(b) * (ceil_div(K, E::kPair) * E::kPair) + k * columns(b);
  }
};

// Blocks [b0, b1), from the last to the first if `back`, as a step of `rows` rows takes them: several at once where few rows meet them
// (the matrix's last may be narrower, and is met alone then), else one by one.
struct PanelRuns {
  int64_t b0, b1, most, runs, narrow;
  bool back;
  template <class E>
  PanelRuns(const Panels<E>& p, int64_t first, int64_t last, bool backwards, int64_t rows)
      : b0(first), b1(last), back(backwards) {
    most = b0 < b1 ? panels_at_once(rows, p.vectors(b0), p.gates) : 1;
    narrow = b0 < b1 && p.vectors(b1 - 1) != p.vectors(b0);
    runs = most == 1 ? b1 - b0 - narrow : (b1 - b0 - narrow) / most;
  }
  int64_t count() const { return b1 - b0 - runs * (most - 1); }
  // f(b, n) for the i-th of them, which takes the n blocks from b on.
  template <class F>
  void at(int64_t i, F&& f) const {
    if (back && narrow && i-- == 0) return f(b1 - 1, int(1));
    const int64_t n = i < runs ? most : 1, done = i < runs ? i * most : runs * most + (i - runs);
    f(back ? b1 - narrow - done - n : b0 + done, int(n));
  }
};

template <class Dst, class Src>
FASTRNN_INLINE Dst convert(Src x) {
  if constexpr (sizeof(Src) == 2 && sizeof(Dst) == 2) {
    return x;
  } else if constexpr (sizeof(Src) == 2) {
    return Dst(to_float(x));
  } else if constexpr (sizeof(Dst) == 2) {
    return to_bf16(float(x));
  } else {
    return Dst(x);
  }
}

template <class Dst, class Src>
FASTRNN_INLINE void convert_row(Dst* d, const Src* s, int64_t n) {
  if constexpr (sizeof(Dst) == sizeof(Src)) {
    std::memcpy(d, s, n * sizeof(Dst));
  } else {
    using V = Vec<float>;
    for (int64_t i = 0; i < n; i += V::W) {
      int w = static_cast<int>(imin(V::W, n - i));
      store_as<V>(d + i, load_as<V>(s + i, w), w);
    }
  }
}

#if defined(__AVX512F__)
// 16 x 16 transpose in registers: s has rows of stride ld, d rows of stride ldd.
FASTRNN_INLINE void transpose16(const float* s, int64_t ld, float* d, int64_t ldd) {
  __m512 r[16], t[16];
  FASTRNN_UNROLL for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(s + i * ld);
  FASTRNN_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  FASTRNN_UNROLL for (int i = 0; i < 16; i += 4) {
    __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    __m512d c = _mm512_castps_pd(t[i + 2]), e = _mm512_castps_pd(t[i + 3]);
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, e));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, e));
  }
  FASTRNN_UNROLL for (int j = 0; j < 4; j++) {
    t[j] = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
  }
  FASTRNN_UNROLL for (int j = 0; j < 4; j++) {
    _mm512_storeu_ps(d + j * ldd, _mm512_shuffle_f32x4(t[j], t[8 + j], 0x88));
    _mm512_storeu_ps(d + (4 + j) * ldd, _mm512_shuffle_f32x4(t[4 + j], t[12 + j], 0x88));
    _mm512_storeu_ps(d + (8 + j) * ldd, _mm512_shuffle_f32x4(t[j], t[8 + j], 0xdd));
    _mm512_storeu_ps(d + (12 + j) * ldd, _mm512_shuffle_f32x4(t[4 + j], t[12 + j], 0xdd));
  }
}
#elif defined(__AVX2__)
FASTRNN_INLINE void transpose8(const float* s, int64_t ld, float* d, int64_t ldd) {
  __m256 r[8], t[8];
  FASTRNN_UNROLL for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(s + i * ld);
  FASTRNN_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  FASTRNN_UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  FASTRNN_UNROLL for (int j = 0; j < 4; j++) {
    _mm256_storeu_ps(d + j * ldd, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
    _mm256_storeu_ps(d + (4 + j) * ldd, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
  }
}
#endif

// dst[k][c] = src[c][k] for n rows of src (row stride ld) and K columns; dst rows of stride ldd.
template <class E, class Src>
static void transpose_strip(const Src* src, int64_t ld, int n, int64_t K, typename E::A* dst, int64_t ldd) {
  using A = typename E::A;
  int64_t k = 0;
  if constexpr (sizeof(A) == 4 && sizeof(Src) == 4) {
#if defined(__AVX512F__)
    if (n == 16)
      for (; k + 16 <= K; k += 16) transpose16(src + k, ld, dst + k * ldd, ldd);
#elif defined(__AVX2__)
    if (n == 8)
      for (; k + 8 <= K; k += 8) transpose8(src + k, ld, dst + k * ldd, ldd);
#endif
  }
  for (int c = 0; c < n; c++)
    for (int64_t j = k; j < K; j++) {
      int64_t at = E::kPair == 1 ? j * ldd + c : (j / 2) * 2 * ldd + 2 * c + (j & 1);
      dst[at] = convert<A>(src[c * ld + j]);
    }
}

// Block b of a gate matrix (torch layout: rows g * width + u, K columns): one stream of the micro-kernel.
template <class E, class Src>
static void pack_block(const Panels<E>& p, const Src* w, int64_t K, typename E::A* out, int64_t b) {
  using A = typename E::A;
  const int64_t cols = p.columns(b);
  const int units = p.units(b);
  const int64_t padded = ceil_div(K, E::kPair) * E::kPair;
  const int strip = strip_vectors(p.vectors(b)) * E::W;
  if (p.gates * units != cols || padded != K) std::memset(out, 0, cols * padded * sizeof(A));
  for (int g = 0; g < p.gates; g++)
    for (int u = 0, n; u < units; u += n) {
      const int c = g * units + u;
      n = static_cast<int>(imin(imin(E::W, units - u), strip - c % strip));
      transpose_strip<E, Src>(w + (g * p.width + p.first(b) + u) * K, K, n, K,
                              out + c / strip * padded * strip + c % strip * E::kPair, strip);
    }
}

// Blocks [first, last) of a gate matrix, each where its stream begins in `dst`.
template <class E, class Src>
static void pack_gates(const Panels<E>& p, const Src* w, int64_t K, typename E::A* dst, int64_t first,
                       int64_t last) {
  for (int64_t b = first; b < last; b++) pack_block<E, Src>(p, w, K, dst + p.stream(b, K), b);
}

// Whether vectors from p on are cache lines that stream_as() may write.
template <class V>
FASTRNN_INLINE bool streamable(const void* p) {
  return sizeof(V) == 64 && reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// Past the caches where a vector is a cache line: memory is not read before it is written.
template <class V>
FASTRNN_INLINE void stream_as(typename V::T* p, V a) {
#if defined(__AVX512F__)
  if constexpr (std::is_same<V, Vec<float>>::value)
    _mm512_stream_ps(p, a.v);
  else
    _mm512_stream_pd(p, a.v);
#else
  V::store(p, a);
#endif
}

// What went past the caches is there for whoever sees what this thread writes next.
FASTRNN_INLINE void end_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// f(G, i) for groups of G, a constant and as large as fit, over [i, end).
template <class F>
FASTRNN_INLINE void in_groups(int64_t i, int64_t end, F&& f) {
  for (; i + 8 <= end; i += 8) f(std::integral_constant<int, 8>{}, i);
  for (; i + 2 <= end; i += 2) f(std::integral_constant<int, 2>{}, i);
  if (i < end) f(std::integral_constant<int, 1>{}, i);
}

// Matrix already stored [k][width] (row stride ld): the operand of gradients. One gate and strip, no transpose. Several blocks at a
// time, so that a row is read in long runs: one block of it is a cache line, and its rows are pages apart. `past`: the caches, where
// more is packed than they hold; end_streams() is the caller's.
template <class E, class Src>
static void pack_rows(const Panels<E>& p, const Src* w, int64_t ld, int64_t K, typename E::A* dst,
                      int64_t first, int64_t last, bool past = false) {
  static_assert(E::kPair == 1, "gradients are computed in the compute type");
  using V = typename E::V;
  in_groups(first, last, [&](auto group, int64_t b) {
    constexpr int G = decltype(group)::value;
    const Src* s = w + p.first(b);
    typename E::A* out = dst + p.stream(b, K);
    const int64_t cols = p.columns(b), apart = cols * K;
    const int units = p.units(b + G - 1);  // of the last, which may be narrower
    if (p.columns(b + G - 1) == cols && units % E::W == 0) {
      const bool streams = past && streamable<V>(out);
      for (int64_t k = 0; k < K; k++, s += ld, out += cols)
        for (int g = 0; g < G; g++)
          for (int64_t u = 0; u < cols; u += E::W) {
            const V v = load_as<V>(s + g * cols + u, E::W);
            if (streams)
              stream_as<V>(out + g * apart + u, v);
            else
              V::store(out + g * apart + u, v);
          }
      return;
    }
    for (int g = 0; g < G; g++) {
      const int64_t wide = p.columns(b + g);
      for (int64_t k = 0; k < K; k++)
        for (int64_t u = 0; u < wide; u += E::W)
          V::store(out + g * apart + k * wide + u,
                   load_as<V>(s + k * ld + g * cols + u, static_cast<int>(imin(E::W, p.units(b + g) - u))));
    }
  });
}

// One matmul stage of a step: `gates` gates of `width` units, from rows first_gate * width on.
template <class E>
struct Stage {
  Panels<E> panels;
  bool from_x = false;  // has an input term
  int64_t first_gate = 0, Kx = 0, Kh = 0;
  size_t x = 0, h = 0, bias = 0, h_bias = 0;  // byte offsets inside a direction's packed weights
};

// The stages of each cell and where their packed weights lie.
template <class E>
struct PackedLayout {
  Stage<E> stage[2];
  int stages = 0;
  size_t bytes = 0;  // of one direction

  // Without matrices there are biases only: a step that uses a panel once packs it when it comes to it.
  explicit PackedLayout(const Problem& p, bool matrices = true) : matrices_(matrices) {
    switch (p.cell) {
      case Cell::lstm:
      case Cell::lstm_layer_norm:
        add(4, p.H, 0, true, p.I, p.O);
        if (p.projected) add(1, p.O, 0, false, 0, p.H);
        break;
      case Cell::gru:
      case Cell::gru_layer_norm:
        add(3, p.H, 0, true, p.I, p.O);
        break;
      case Cell::gru_reset_before:
        add(2, p.H, 0, true, p.I, p.O);
        add(1, p.H, 2, true, p.I, p.O);
        break;
      default:
        add(1, p.H, 0, true, p.I, p.O);
    }
  }

 private:
  bool matrices_;
  void add(int gates, int64_t width, int64_t first_gate, bool from_x, int64_t Kx, int64_t Kh) {
    Stage<E>& s = stage[stages++];
    // A narrow single-gate matrix gets half-width blocks, so that two threads have something to share.
    s.panels = Panels<E>(gates, width, gates > 1 ? kMaxVectors : width <= 8 * E::W ? 2 : kNarrow);
    s.from_x = from_x;
    s.first_gate = first_gate;
    s.Kx = from_x ? Kx : 0;
    s.Kh = Kh;
    s.x = take(matrices_ ? s.panels.elements(s.Kx) * sizeof(typename E::A) : 0);
    s.h = take(matrices_ ? s.panels.elements(s.Kh) * sizeof(typename E::A) : 0);
    s.bias = take(s.panels.total() * sizeof(typename E::T));
    s.h_bias = take(s.panels.total() * sizeof(typename E::T));
  }
  size_t take(size_t n) {
    size_t at = bytes;
    bytes += align64(n);
    return at;
  }
};

// Biases of blocks [first, last): the input side carries both, except GRU's n gate (reset_after),
// whose recurrent bias must stay inside the product with r.
template <class E>
static void pack_bias(const Problem& p, const Stage<E>& s, const Weights& w, char* dst, int64_t first,
                      int64_t last) {
  using T = typename E::T;
  const auto* bi = static_cast<const typename E::IO*>(s.from_x ? w.b_ih : nullptr);
  const auto* bh = static_cast<const typename E::IO*>(s.from_x ? w.b_hh : nullptr);
  T* x = reinterpret_cast<T*>(dst + s.bias);
  T* h = reinterpret_cast<T*>(dst + s.h_bias);
  for (int64_t b = first; b < last; b++) {
    const int64_t at = s.panels.offset(b);
    const int units = s.panels.units(b);
    for (int64_t c = 0; c < s.panels.columns(b); c++) x[at + c] = h[at + c] = T(0);
    if (!bi) continue;
    for (int g = 0; g < s.panels.gates; g++)
      for (int u = 0; u < units; u++) {
        const int64_t src = (s.first_gate + g) * s.panels.width + s.panels.first(b) + u;
        const int64_t c = at + g * units + u;
        const T vi = convert<T>(bi[src]), vh = convert<T>(bh[src]);
        const bool apart = p.cell == Cell::gru && g == 2;
        x[c] = apart ? vi : vi + vh;
        h[c] = apart ? vh : T(0);
      }
  }
}

// Where a stage's matrix begins in the weights: its input term's, or its recurrent one (w_hr: the projection).
template <class E>
static const typename E::IO* stage_matrix(const Stage<E>& s, const Weights& w, bool input) {
  const void* m = input ? w.w_ih : s.from_x ? w.w_hh : w.w_hr;
  return static_cast<const typename E::IO*>(m) + s.first_gate * s.panels.width * (input ? s.Kx : s.Kh);
}

// Thread tid's share of packing one direction.
template <class E>
static void pack_direction(const Problem& p, const PackedLayout<E>& layout, const Weights& w, char* dst,
                           int tid, int nt, bool matrices = true) {
  using A = typename E::A;
  using IO = typename E::IO;
  for (int i = 0; i < layout.stages; i++) {
    const Stage<E>& s = layout.stage[i];
    const int64_t first = s.panels.blocks * tid / nt, last = s.panels.blocks * (tid + 1) / nt;
    if (matrices && s.from_x)
      pack_gates<E, IO>(s.panels, stage_matrix(s, w, true), s.Kx, reinterpret_cast<A*>(dst + s.x), first,
                        last);
    if (matrices)
      pack_gates<E, IO>(s.panels, stage_matrix(s, w, false), s.Kh, reinterpret_cast<A*>(dst + s.h), first,
                        last);
    pack_bias<E>(p, s, w, dst, first, last);
  }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
