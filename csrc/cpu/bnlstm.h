// The CPU library's C++ interface to the batch-normalised LSTM: one layer over a whole sequence.
//
// The rules of layer.h hold. Problem::cell is lstm and O is H. Steps are counted in the order a direction
// processes them, from each sequence's own first step: step s of row n is time s, or length(n) - 1 - s in the
// second direction. Statistics of a step are over the rows that reach it.
#pragma once
#include "layer.h"

namespace fastrnn {

struct BnLstmWeights {  // w_ih (4H, I), w_hh (4H, H), vectors (4H) and (H); bias may be null
  const void *w_ih = nullptr, *w_hh = nullptr, *bias = nullptr;
  const void *gamma_ih = nullptr, *gamma_hh = nullptr, *gamma_c = nullptr, *beta_c = nullptr;
};

struct BnLstmProblem : Problem {
  bool batch = false;     // statistics of the batch where a step has two rows, else given ones throughout
  bool sequence = false;  // the input term's statistics are shared by all steps
  double eps = 0;
};

// Mean and biased variance of the input term, the recurrent term and the cell.
constexpr int kBnTerms = 3;

struct BnLstmForwardArgs : BnLstmProblem {
  Grid x, y, cells;  // cells.data may be null
  const void *h0 = nullptr, *c0 = nullptr;
  void *h_n = nullptr, *c_n = nullptr;
  BnLstmWeights weights[2];
  const void* packed = nullptr;  // w_ih and w_hh from Kernels::pack, or null: packed inside the call
  // Given statistics (rows, 4H | 4H | H); step s reads row min(s, rows - 1).
  struct {
    const void *mean[kBnTerms] = {}, *var[kBnTerms] = {};
    int64_t rows[kBnTerms] = {};
  } given[2];
  // Those used: (D, 2, T, width), mean then variance; T is 1 for a shared input term. Null: not wanted.
  void* used[kBnTerms] = {};
  void* tape = nullptr;  // normalised input and recurrent terms, (D, rows, bnlstm_tape_width()), or null
  void* workspace = nullptr;
};

struct BnLstmBackwardArgs : BnLstmProblem {
  Grid x, y, cells, dx, dy, dcells;  // dx.data, dy.data, dcells.data may be null
  const void *h0 = nullptr, *c0 = nullptr, *dh_n = nullptr, *dc_n = nullptr;
  void *dh0 = nullptr, *dc0 = nullptr;  // null: not wanted
  BnLstmWeights weights[2];
  const void* used[kBnTerms] = {};
  const void* tape = nullptr;
  struct {
    void *w_ih = nullptr, *w_hh = nullptr, *bias = nullptr;
    void *gamma_ih = nullptr, *gamma_hh = nullptr, *gamma_c = nullptr, *beta_c = nullptr;
  } grads[2];
  bool want_weights = false;
  void* workspace = nullptr;
};

// Running statistics that follow those of a batch: running += weight * (found - running), n elements each, and the counts of
// batches of `steps` steps.
struct BnLstmFollowArgs {
  Type type = Type::f32;
  int threads = 1, count = 0;
  double weight = 0;
  struct {
    void* running;
    const void* found;
    int64_t n;
  } moves[2 * 2 * kBnTerms] = {};
  int64_t* counts[2] = {};
  int64_t steps = 0;
};

// Elements a row of the tape: enough for every instruction set's blocks.
inline int64_t bnlstm_tape_width(int64_t H) { return 2 * ((4 * H + 15) / 16 * 16); }

struct BnLstmKernels {
  int (*threads)(const BnLstmProblem&);
  size_t (*forward_workspace)(const BnLstmForwardArgs&);
  void (*forward)(const BnLstmForwardArgs&);
  size_t (*backward_workspace)(const BnLstmBackwardArgs&);
  void (*backward)(const BnLstmBackwardArgs&);
  void (*follow)(const BnLstmFollowArgs&);
};

}  // namespace fastrnn
