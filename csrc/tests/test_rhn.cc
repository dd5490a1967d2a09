// The Recurrent Highway Network through the C++ interface against the scalar layer of naive_rhn.h, forward and backward: odd sizes,
// strides, lengths, packed batches, resets, masks, both carries, both directions, several threads, every instruction set.
#include "rhn_trial.h"

namespace {

using namespace fastrnn;
using namespace trial;

void check_training(const RhnOptions& o, unsigned seed) {
  RhnTrial trial(o, seed);
  trial.forward(nullptr);
  trial.compare_forward();
  trial.clear_results();
  trial.run_training();
  trial.compare_forward();
  trial.compare_backward();
}

RhnOptions draw(Random& random, Type type) {
  constexpr int64_t kHidden[] = {1, 7, 17, 33, 65};
  RhnOptions o;
  o.type = type;
  o.rows = static_cast<Rows>(random.between(0, 4));
  o.partition = static_cast<Partition>(random.between(0, 2));
  o.gates = static_cast<int>(random.between(2, 3));
  o.depth = static_cast<int>(random.between(1, 4));
  const int groups[] = {0, 1, o.gates};
  o.x_groups = groups[random.between(0, 2)];
  o.s_groups = groups[random.between(0, 2)];
  o.T = random.between(1, 7);
  o.N = random.between(1, 13);
  o.I = random.between(1, 37);
  o.H = kHidden[random.between(0, 4)];
  o.directions = static_cast<int>(random.between(1, 2));
  o.threads = static_cast<int>(random.between(1, 3));
  o.bias = random.between(0, 3) > 0;
  o.reset = random.coin();
  o.prepacked = o.x_groups < 2 && o.s_groups < 2 && random.coin();
  o.scattered = random.coin();
  o.recompute = random.between(0, 2) == 0;
  return o;
}

}  // namespace

TEST(random_options) {
  each_isa([] {
    for (Type type : {Type::f32, Type::f64}) {
      Random random(21);
      for (int i = 0; i < (kThreadSanitizer ? 10 : kSanitizer ? 20 : 40); ++i)
        check_training(draw(random, type), 2100 + i);
    }
  });
}

// A chunk has 192 rows in the forward and 384 in the backward: lengths end, and resets cut, inside and between them.
TEST(several_chunks) {
  each_isa([] {
    for (Rows rows : {Rows::dense, Rows::lengths, Rows::packed})
      for (bool recompute : {false, true}) {
        RhnOptions o;
        o.rows = rows;
        o.recompute = recompute;
        o.reset = o.rows == Rows::lengths;
        o.depth = 2;
        o.directions = 2;
        o.threads = 2;
        o.gates = recompute ? 2 : 3;
        o.s_groups = recompute ? 1 : 3;
        o.T = 41;
        o.N = 21;
        o.H = 7;
        check_training(o, 22);
      }
  });
}

// One chunk, although its rows are more than a weight gradient adds up at once; an odd width, so that not all micro-steps' packed
// weights fit where their gradients will be.
TEST(weights_packed_in_their_gradients) {
  each_isa([] {
    RhnOptions o;
    o.depth = 2;
    o.gates = 3;
    o.threads = 2;
    o.T = 514;
    o.N = 1;
    o.I = 5;
    o.H = 343;
    check_training(o, 24);
  });
}

// A tape in groups of units that goes past the caches; the last group is narrower, and steps begin within cache lines or at them.
TEST(large_tape) {
  each_isa([] {
    for (Rows rows : {Rows::dense, Rows::lengths, Rows::packed}) {
      if (kSanitizer && rows != Rows::packed) continue;
      RhnOptions o;
      o.type = rows == Rows::lengths ? Type::f64 : Type::f32;
      o.rows = rows;
      o.reset = rows == Rows::lengths;
      o.depth = 6;
      o.gates = rows == Rows::dense ? 2 : 3;
      o.s_groups = rows == Rows::dense ? 0 : 1;
      o.directions = 2;
      o.threads = 2;
      o.T = rows == Rows::dense ? 104 : rows == Rows::packed ? 150 : 69;
      o.N = rows == Rows::dense ? 58 : 61;
      o.I = 5;
      o.H = 30;
      check_training(o, 25);
    }
  });
}

// Above the plan's thresholds for a team: units and rows, a thread without work among them.
TEST(shapes_wide_enough_for_a_team) {
  each_isa([] {
    for (Partition partition : {Partition::units, Partition::rows})
      for (int gates : {2, 3})
        for (int64_t N : {1, 9}) {
          RhnOptions o;
          o.partition = partition;
          o.gates = gates;
          o.s_groups = N == 9 ? gates : 0;
          o.x_groups = N == 9;
          o.rows = N == 9 ? Rows::lengths : Rows::dense;
          o.reset = N == 9;
          o.recompute = gates == 3;
          o.threads = 3;
          o.T = 4;
          o.N = N;
          o.H = N == 9 ? 65 : 129;
          int threads = 0;
          RhnForwardArgs a;
          RhnTrial trial(o, 23);
          trial.fill(a);
          CHECK(kernels().rhn->plan(a, &threads) == partition);
          CHECK_EQ(threads, 3);
          trial.run_training();
          trial.compare_forward();
          trial.compare_backward();
        }
  });
}

TEST(results_do_not_depend_on_threads_or_partition) {
  each_isa([] {
    for (int groups : {0, 1, 3})
      for (bool recompute : {false, true}) {
        RhnOptions o;
        o.gates = 3;
        o.x_groups = o.s_groups = groups;
        o.recompute = recompute;
        o.rows = recompute ? Rows::lengths : Rows::packed;
        o.directions = 2;
        o.T = 5;
        o.N = 11;
        o.I = 35;
        o.H = 50;
        RhnTrial alone(o, 24);
        alone.run_training();
        for (Partition partition : {Partition::automatic, Partition::units, Partition::rows})
          for (int threads : {1, 2, 4}) {
            if (kThreadSanitizer && (threads != 4 || partition == Partition::automatic)) continue;
            o.partition = partition;
            o.threads = threads;
            o.scattered = threads != 2;
            RhnTrial other(o, 24);
            other.run_training();
            if (!alone.same_bits(other))
              check::fail(__FILE__, __LINE__, "other bits than one thread: " + o.text());
          }
      }
  });
}

int main(int argc, char** argv) { return check::run(argc, argv); }
