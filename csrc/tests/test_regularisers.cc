// Recurrent dropout and zoneout inside the kernels, forward and backward, against the scalar layer, whose masks follow their definition
// word by word: every mode of every cell, in training and as expectations, through every layout, thread count and instruction set.
#include "trial.h"

namespace {

using namespace fastrnn;
using namespace trial;

constexpr std::array<Cell, 5> kCells{Cell::lstm, Cell::gru, Cell::gru_reset_before, Cell::rnn_tanh,
                                     Cell::rnn_relu};
constexpr std::array<Cell, 2> kNormed{Cell::lstm_layer_norm, Cell::gru_layer_norm};

bool is_elman(Cell cell) { return cell == Cell::rnn_tanh || cell == Cell::rnn_relu; }

Noise draw_noise(Random& random, Cell cell) {
  Noise n;
  n.training = random.between(0, 2) > 0;
  // In evaluation the inverted masks of "state" have no expectation to be put in, and no kernel is asked for it.
  do {
    n.mode = static_cast<Drop>(random.between(0, 3));
  } while ((n.mode == Drop::cell && !is_lstm(cell)) || (n.mode == Drop::update && is_elman(cell)) ||
           (n.mode == Drop::state && !n.training));
  n.per_sequence = random.coin();
  if (n.mode != Drop::none) n.drop = random.between(0, 9) ? 0.4 : 1;  // 1: everything is dropped, exactly
  if (n.mode == Drop::none || random.coin()) n.zoneout_h = 0.3;
  if (is_lstm(cell) && random.coin()) n.zoneout_c = 0.25;
  n.layer = random.between(0, 3);
  return n;
}

template <size_t Count>
void random_options(Type type, const std::array<Cell, Count>& cells, int count, unsigned seed) {
  each_isa([&] {
    Random random(seed);
    for (int i = 0; i < count; ++i) {
      Options o = draw(random, type, cells);
      o.noise = draw_noise(random, o.cell);
      check_training(o, 100 * seed + i);
    }
  });
}

}  // namespace

TEST(random_options_f32) { random_options(Type::f32, kCells, kThreadSanitizer ? 8 : 40, 41); }
TEST(random_options_f64) { random_options(Type::f64, kCells, kSanitizer ? 12 : 40, 42); }
TEST(layer_norm_f64) { random_options(Type::f64, kNormed, kSanitizer ? 8 : 20, 43); }

// Units beyond one word of 64 bits, rows and units divided among threads, several chunks.
TEST(shapes_wide_enough_for_a_team) {
  each_isa([] {
    for (Cell cell : kCells)
      for (Partition partition : {Partition::units, Partition::rows})
        for (Drop mode : {Drop::state, Drop::update}) {
          if (mode == Drop::update && is_elman(cell)) continue;
          Options o;
          o.cell = cell;
          o.partition = partition;
          o.noise.mode = mode;
          o.noise.training = true;
          o.noise.per_sequence = partition == Partition::rows;
          o.noise.drop = 0.4;
          o.noise.zoneout_h = 0.3;
          if (is_lstm(cell)) o.noise.zoneout_c = 0.25;
          o.recompute = mode == Drop::update;
          o.rows = mode == Drop::update ? Rows::lengths : Rows::packed;
          o.reset = true;
          o.threads = 3;
          o.T = kSanitizer ? 14 : 27;
          o.N = 17;
          o.I = 5;
          o.H = 67;
          check_training(o, 44);
        }
  });
}

// What weight dropout and the masks of whole tensors are made of, by a team.
TEST(random_words_do_not_depend_on_threads) {
  each_isa([] {
    const int64_t T = 3, N = 331, units = 67;
    std::vector<uint32_t> want(T * N * units), words(want.size());
    std::vector<uint8_t> keep(want.size());
    const uint64_t threshold = drop_threshold(0.3);
    kernels().random({77, 5, threshold, T, N, units, 1}, want.data(), nullptr);
    kernels().random({77, 5, threshold, T, N, units, 3}, words.data(), keep.data());
    CHECK(words == want);
    for (size_t i = 0; i < want.size(); ++i) CHECK_EQ(int(keep[i]), int(want[i] >= threshold));
  });
}

int main(int argc, char** argv) { return check::run(argc, argv); }
