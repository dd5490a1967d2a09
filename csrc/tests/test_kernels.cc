// Every cell, forward and backward, through the C++ interface against the scalar layer of naive.h:
// odd sizes, strides, lengths, packed batches, resets, projection, both directions, several
// threads, every instruction set.
#include <array>
#include <memory>
#include <string>
#include <thread>

#include "check.h"
#include "trial.h"

namespace {

using namespace fastrnn;
using namespace trial;

constexpr std::array<Cell, 5> kCells{Cell::lstm, Cell::gru, Cell::gru_reset_before, Cell::rnn_tanh,
                                     Cell::rnn_relu};
// Compared in double: where few values make a spread small by chance, a norm enlarges what float has rounded.
constexpr std::array<Cell, 2> kNormed{Cell::lstm_layer_norm, Cell::gru_layer_norm};

}  // namespace

TEST(each_cell_at_a_plain_shape) {
  each_isa([] {
    for (Cell cell : kCells)
      for (Type type : {Type::f32, Type::f64}) {
        Options o;
        o.cell = cell;
        o.type = type;
        check_training(o, 1);
      }
  });
}

TEST(random_options_f32) {
  each_isa([] {
    Random random(7);
    for (int i = 0; i < (kThreadSanitizer ? 8 : 40); ++i)
      check_training(draw(random, Type::f32, kCells), 100 + i);
  });
}

TEST(random_options_f64) {
  each_isa([] {
    Random random(8);
    for (int i = 0; i < (kSanitizer ? 8 : 15); ++i) check_training(draw(random, Type::f64, kCells), 500 + i);
  });
}

TEST(random_options_bf16) {
  each_isa([] {
    Random random(9);
    for (int i = 0; i < (kSanitizer ? 8 : 15); ++i) check_training(draw(random, Type::bf16, kCells), 900 + i);
  });
}

TEST(bf16_weights_forward) {
  each_isa([] {
    Random random(10);
    for (int i = 0; i < (kSanitizer ? 8 : 15); ++i) {
      Trial trial(draw(random, Type::f32_bf16, kCells), 1300 + i);
      trial.forward(false, nullptr);
      trial.compare_forward();
    }
  });
}

TEST(layer_norm_random_options) {
  each_isa([] {
    Random random(12);
    for (int i = 0; i < (kSanitizer ? 8 : 20); ++i) {
      const Options o = draw(random, random.coin() ? Type::f32 : Type::f64, kNormed);
      Trial inference(o, 1700 + i), first(o, 1700 + i), again(o, 1700 + i);
      inference.forward(false, nullptr);
      first.run_training();
      again.run_training();
      if (o.type == Type::f64) {
        first.compare_forward();
        first.compare_backward();
      }
      CHECK(first.same_bits(again));
      CHECK(inference.y.same_bits(first.y) && inference.h_n.same_bits(first.h_n));
    }
  });
}

TEST(shapes_wide_enough_for_a_team) {
  each_isa([] {
    for (Cell cell : kCells)
      for (Partition partition : {Partition::units, Partition::rows})
        for (int directions : {1, 2}) {
          Options o;
          o.cell = cell;
          o.partition = partition;
          o.directions = directions;
          o.T = 4;
          o.N = 17;
          o.I = 21;
          o.H = 49;
          o.threads = 3;
          o.scattered = directions == 1;
          if (kThreadSanitizer) o.N = 9, o.H = 34;
          if (kSanitizer && directions == 2) continue;  // one direction is slow enough there
          check_training(o, 3);
        }
  });
}

// With one chunk of rows and widths of whole vectors the backward packs weights where their gradients will be. Of a large weight_ih
// of another width each thread packs a few blocks at a time.
TEST(where_the_backward_packs_weights) {
  each_isa([] {
    for (Partition partition : {Partition::units, Partition::rows}) {
      Options o;
      o.partition = partition;
      o.I = 32;
      o.H = 64;
      for (Cell cell : kCells)
        for (int directions : {1, 2}) {
          o.cell = cell;
          o.directions = directions;
          o.T = 4;
          o.N = 9;
          o.P = is_lstm(cell) && directions == 2 ? 32 : 0;
          o.threads = directions == 2 ? 4 : 3;
          o.recompute = directions == 1;
          check_training(o, 13);
        }
      Options large;
      large.partition = partition;
      large.cell = Cell::gru;
      large.T = 2;
      large.I = 517;
      large.H = 170;
      large.threads = 2;
      large.scattered = true;
      check_training(large, 14);
    }
  });
}

TEST(results_do_not_depend_on_threads_or_partition) {
  each_isa([] {
    std::vector<Cell> all(kCells.begin(), kCells.end());
    all.insert(all.end(), kNormed.begin(), kNormed.end());
    for (Cell cell : all)
      for (Rows rows : {Rows::dense, Rows::lengths, Rows::packed}) {
        if (kSanitizer && rows == Rows::dense) continue;
        Options o;
        o.cell = cell;
        o.rows = rows;
        o.directions = 2;
        o.T = 11;
        o.N = 21;
        o.I = 35;
        o.H = 50;
        Trial alone(o, 5);
        alone.run_training();
        for (Partition partition : {Partition::automatic, Partition::units, Partition::rows})
          for (int threads : {1, 2, 4}) {
            if (kThreadSanitizer && (threads != 2 || partition == Partition::automatic)) continue;
            o.partition = partition;
            o.threads = threads;
            o.scattered = threads == 4 || kThreadSanitizer;
            Trial other(o, 5);
            other.run_training();
            if (!alone.same_bits(other))
              check::fail(__FILE__, __LINE__, "other bits than one thread: " + o.text());
          }
      }
  });
}

TEST(concurrent_callers) {
  // The second of two simultaneous calls gets fewer threads than it asked for.
  each_isa([] {
    for (Cell cell : kCells)
      for (Type type : {Type::f32, Type::bf16}) {
        Options o;
        o.cell = cell;
        o.type = type;
        o.partition = Partition::units;
        o.T = 10;
        o.N = 6;
        o.I = 40;
        o.H = 64;
        o.threads = 4;
        Trial expected(o, 11);
        expected.run_training();
        std::array<std::thread, 4> callers;
        std::array<std::unique_ptr<Trial>, 4> trials;
        for (auto& trial : trials) trial = std::make_unique<Trial>(o, 11);
        for (int i = 0; i < 4; ++i)
          callers[i] = std::thread([&trials, i] {
            for (int round = 0; round < 3; ++round) trials[i]->run_training();
          });
        for (auto& caller : callers) caller.join();
        for (auto& trial : trials) CHECK(trial->same_bits(expected));
      }
  });
}

int main(int argc, char** argv) { return check::run(argc, argv); }
