// The table of one instruction set: kernels*.cc are compiled once per set, with FASTRNN_ISA_NAME and that set's flags.
#include "kernel_types.h"
#include "machine.h"
#include "norm.h"
#include "plan.h"
#include "random.h"
#include "rhn.h"

namespace fastrnn {
namespace FASTRNN_ISA {
namespace {

Partition plan(const Problem& p, int* threads) {
  const Plan chosen = choose_plan(p);
  *threads = chosen.threads;
  return chosen.units ? Partition::units : Partition::rows;
}

size_t packed_bytes(const Problem& p) {
  return with_own_type(p.type, [&](auto e) { return PackedLayout<decltype(e)>(p).bytes * p.directions; });
}

void pack(const Problem& p, const Weights* weights, void* packed) {
  with_own_type(p.type, [&](auto e) {
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
  return normalises(a.cell) ? norm_forward_workspace(a) : layer_forward_workspace(a);
}
void forward(const ForwardArgs& a) { normalises(a.cell) ? norm_forward(a) : layer_forward(a); }
size_t backward_workspace(const BackwardArgs& a) {
  return normalises(a.cell) ? norm_backward_workspace(a) : layer_backward_workspace(a);
}
void backward(const BackwardArgs& a) { normalises(a.cell) ? norm_backward(a) : layer_backward(a); }

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
