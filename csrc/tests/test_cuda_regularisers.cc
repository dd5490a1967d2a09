// Recurrent dropout and zoneout inside the kernels, forward and backward, against the double-precision layer, whose masks
// follow their definition word by word.
#include "cuda_cases.h"

namespace trial {

using fastrnn::Drop;

// Each mode a cell has, in training for each step and for the sequence, and in evaluation; zoneout beside it and alone.
template <class Cell>
std::vector<fastrnn::Noise> noises() {
  std::vector<Drop> modes = {Drop::none, Drop::state};
  if (Cell::kTape) modes.push_back(Drop::update);
  if (Cell::kHasCell) modes.push_back(Drop::cell);
  std::vector<fastrnn::Noise> all;
  for (const Drop mode : modes)
    for (const bool training : {true, false})
      for (const bool per_sequence : {false, true}) {
        if (per_sequence && mode == Drop::none) continue;
        fastrnn::Noise n;
        n.mode = mode, n.training = training, n.per_sequence = per_sequence, n.layer = 3;
        if (mode != Drop::none) n.drop = 0.4;
        if (!per_sequence) n.zoneout_h = 0.3;
        if (!per_sequence && Cell::kHasCell) n.zoneout_c = 0.25;
        all.push_back(n);
      }
  if (Cell::kHasCell) {  // of one state alone
    for (const bool h : {false, true}) {
      fastrnn::Noise n;
      n.training = true;
      (h ? n.zoneout_h : n.zoneout_c) = 0.5;
      all.push_back(n);
    }
  }
  fastrnn::Noise everything;  // dropped or kept whole: the ends of the range are exact
  everything.mode = Drop::state, everything.training = true;
  everything.drop = everything.zoneout_h = 1;
  all.push_back(everything);
  return all;
}

template <class Cell, class D, class T, template <class, class, int> class ExchangeOf>
void regularised() {
  double worst = 0;
  for (const fastrnn::Noise& noise : noises<Cell>()) {
    Options o;
    o.noise = noise;
    o.T = 5, o.N = 5, o.H = noise.per_sequence ? 37 : 40, o.directions = 2, o.lengths = o.reset = true;
    o.groups = ceil_div(o.N, T::kRows);
    std::vector<Tensor<D>> first;
    for (o.seed = 1; o.seed <= 2; o.seed++) {
      const Trial<Cell, D, T, ExchangeOf, false, true> trial(o);
      report(__FILE__, __LINE__, o, trial.failure);
      worst = std::max(worst, trial.worst);
      if (o.seed == 1) first = trial.results;
      if (trial.failure.empty()) CHECK(first == trial.results);
    }
  }
  std::printf("  worst error: %.2f of what is allowed\n", worst);
}

// Without any regulariser the kernels that have them give the bits of those that do not.
template <class Cell>
void nothing_on() {
  Options o;
  o.lengths = o.reset = true;
  const Trial<Cell, Bf16, SmallTile<Bf16>, Sentinel, false, true> with(o);
  const Trial<Cell, Bf16, SmallTile<Bf16>, Sentinel> without(o);
  CHECK_EQ(with.failure, std::string());
  CHECK_EQ(without.failure, std::string());
  CHECK(with.results == without.results);
}

}  // namespace trial

#define FASTRNN_REGULARISED(name, cell)                                                           \
  TEST(name##_bf16_sentinel) { trial::regularised<cell, Bf16, SmallTile<Bf16>, Sentinel>(); }     \
  TEST(name##_bf16x3_cluster) { trial::regularised<cell, Bf16x3, SmallTile<Bf16x3>, Cluster>(); } \
  TEST(name##_nothing_on) { trial::nothing_on<cell>(); }

FASTRNN_REGULARISED(lstm, Lstm)
FASTRNN_REGULARISED(gru, Gru<true>)
FASTRNN_REGULARISED(gru_reset_before, Gru<false>)
FASTRNN_REGULARISED(rnn_tanh, Rnn<false>)
FASTRNN_REGULARISED(rnn_relu, Rnn<true>)

int main(int argc, char** argv) { return check::run(argc, argv); }
