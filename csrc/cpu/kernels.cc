// All kernels of one instruction set: compiled once per set, with FASTRNN_ISA_NAME and that set's flags.
#include "backward.h"
#include "forward.h"
#include "machine.h"
#include "random.h"
#include "rhn.h"

namespace fastrnn {
namespace FASTRNN_ISA {
namespace {

using F32 = Types<float, float, float>;
using F64 = Types<double, double, double>;
using BF16 = Types<float, bf16, bf16>;
using F32xBF16 = Types<float, float, bf16>;
using BF16Grad = Types<float, bf16, float>;

template <class E, bool Linear, class F>
auto with_cell(Cell cell, F&& f) {
  switch (cell) {
    case Cell::lstm:
      return f(LstmCpu<E, Linear>{});
    case Cell::gru:
      return f(GruCpu<E, Linear>{});
    case Cell::gru_reset_before:
      return f(GruResetBeforeCpu<E, Linear>{});
    case Cell::rnn_tanh:
      return f(RnnCpu<E, Linear, false>{});
    default:
      return f(RnnCpu<E, Linear, true>{});
  }
}

template <class E, bool Linear, class F>
auto with_grad(Cell cell, F&& f) {
  switch (cell) {
    case Cell::lstm:
      return f(LstmGradCpu<E, Linear>{});
    case Cell::gru:
      return f(GruGradCpu<E, Linear>{});
    case Cell::gru_reset_before:
      return f(GruResetBeforeGradCpu<E, Linear>{});
    case Cell::rnn_tanh:
      return f(RnnGradCpu<E, Linear, false>{});
    default:
      return f(RnnGradCpu<E, Linear, true>{});
  }
}

template <class F>
auto with_type(Type type, F&& f) {
  switch (type) {
    case Type::f32:
      return f(F32{});
    case Type::f64:
      return f(F64{});
    case Type::bf16:
      return f(BF16{});
    default:
      return f(F32xBF16{});
  }
}

// The linear mode exists for tests, in the types that have a reference to compare with.
template <class E>
constexpr bool kHasLinear = std::is_same<typename E::IO, typename E::A>::value && sizeof(typename E::IO) > 2;

template <class F>
auto forward_class(const Problem& p, F&& f) {
  return with_type(p.type, [&](auto e) {
    using E = decltype(e);
    auto run = [&](auto c) { return f(e, c); };
    if constexpr (kHasLinear<E>)
      if (p.linear) return with_cell<E, true>(p.cell, run);
    return with_cell<E, false>(p.cell, run);
  });
}

template <class F>
auto backward_class(const Problem& p, F&& f) {
  auto pick = [&](auto e) {
    using E = decltype(e);
    auto run = [&](auto c) { return f(e, c); };
    if constexpr (kHasLinear<E>)
      if (p.linear) return with_grad<E, true>(p.cell, run);
    return with_grad<E, false>(p.cell, run);
  };
  switch (p.type) {
    case Type::f64:
      return pick(F64{});
    case Type::bf16:
      return pick(BF16Grad{});
    default:
      return pick(F32{});
  }
}

Partition plan(const Problem& p, int* threads) {
  const Plan chosen = choose_plan(p);
  *threads = chosen.threads;
  return chosen.units ? Partition::units : Partition::rows;
}

size_t packed_bytes(const Problem& p) {
  return with_type(p.type, [&](auto e) { return PackedLayout<decltype(e)>(p).bytes * p.directions; });
}

void pack(const Problem& p, const Weights* weights, void* packed) {
  with_type(p.type, [&](auto e) {
    using E = decltype(e);
    const PackedLayout<E> layout(p);
    team(p.threads, [&](int tid, int nt) {
      for (int d = 0; d < p.directions; d++)
        pack_direction<E>(p, layout, weights[d], static_cast<char*>(packed) + d * layout.bytes, tid, nt);
    });
    return 0;
  });
}

size_t forward_workspace(const ForwardArgs& a) {
  if (normalises(a.cell)) return norm_forward_workspace(a);
  return forward_class(a, [&](auto e, auto c) { return Forward<decltype(e), decltype(c)>::workspace(a); });
}

void forward(const ForwardArgs& a) {
  if (normalises(a.cell)) return norm_forward(a);
  forward_class(a, [&](auto e, auto c) {
    Forward<decltype(e), decltype(c)>::run(a);
    return 0;
  });
}

size_t backward_workspace(const BackwardArgs& a) {
  if (normalises(a.cell)) return norm_backward_workspace(a);
  return backward_class(a, [&](auto e, auto c) { return Backward<decltype(e), decltype(c)>::workspace(a); });
}

void backward(const BackwardArgs& a) {
  if (normalises(a.cell)) return norm_backward(a);
  backward_class(a, [&](auto e, auto c) {
    Backward<decltype(e), decltype(c)>::run(a);
    return 0;
  });
}

void random(const RandomArgs& a, uint32_t* words, uint8_t* keep) {
  team(a.T * a.N * a.units < (1 << 16) ? 1 : a.threads, [&](int tid, int nt) {
    const int64_t rows = a.T * a.N;
    for (int64_t i = rows * tid / nt; i < rows * (tid + 1) / nt; i++) {
      const RandomRow row{a.seed, a.stream, i / a.N, i % a.N};
      if (words) random_words(row, a.units, words + i * a.units);
      for (int64_t draw = 0; keep && draw * kUnitsPerDraw < a.units; draw++) {
        uint64_t bits;
        keep_bits(row, a.threshold, draw, draw + 1, &bits);
        const int64_t first = draw * kUnitsPerDraw, count = imin(kUnitsPerDraw, a.units - first);
        for (int64_t u = 0; u < count; u++) keep[i * a.units + first + u] = bits >> u & 1;
      }
    }
  });
}

}  // namespace

#define FASTRNN_STRING_(x) #x
#define FASTRNN_STRING(x) FASTRNN_STRING_(x)
extern const RhnKernels rhn_table;
extern const BnLstmKernels bnlstm_table;
extern const Kernels table;
const Kernels table = {FASTRNN_STRING(FASTRNN_ISA_NAME),
                       plan,
                       packed_bytes,
                       pack,
                       forward_workspace,
                       forward,
                       backward_workspace,
                       backward,
                       random,
                       peak_flops,
                       bandwidth,
                       &rhn_table,
                       &bnlstm_table};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
