// The batch-normalised LSTM through the C++ interface against the scalar layer of naive_bnlstm.h, forward and backward: statistics of
// the batch, given ones, of each step and of the sequence, odd sizes, lengths, packed batches, resets, both directions, several threads.
#include "bnlstm_trial.h"

namespace {

using namespace fastrnn;
using namespace trial;

void check_training(const BnOptions& o, unsigned seed) {
  BnTrial trial(o, seed);
  trial.forward(nullptr);
  trial.compare_forward(false);
  trial.clear_results();
  trial.run_training();
  trial.compare_forward(true);
  trial.compare_backward();
}

BnOptions draw(Random& random, Type type) {
  constexpr int64_t kHidden[] = {1, 7, 17, 33, 65};
  BnOptions o;
  o.type = type;
  o.batch = random.between(0, 3) > 0;
  o.sequence = random.coin();
  o.given_rows = static_cast<int>(random.between(1, 4));
  o.rows = static_cast<Rows>(random.between(0, 4));
  o.T = random.between(1, 7);
  o.N = random.between(1, 13);
  o.I = random.between(1, 37);
  o.H = kHidden[random.between(0, 4)];
  o.directions = static_cast<int>(random.between(1, 2));
  o.threads = static_cast<int>(random.between(1, 3));
  o.bias = random.between(0, 3) > 0;
  o.reset = random.coin();
  o.prepacked = random.coin();
  o.cells = random.coin();
  o.scattered = random.coin();
  return o;
}

}  // namespace

TEST(random_options) {
  each_isa([] {
    for (Type type : {Type::f32, Type::f64}) {
      Random random(31);
      for (int i = 0; i < (kThreadSanitizer ? 10 : kSanitizer ? 20 : 40); ++i)
        check_training(draw(random, type), 3100 + i);
    }
  });
}

// One row has no statistics of its own.
TEST(a_batch_of_one) {
  each_isa([] {
    for (bool sequence : {false, true}) {
      BnOptions o;
      o.sequence = sequence;
      o.N = 1;
      o.H = 17;
      check_training(o, 32);
    }
  });
}

// A chunk has 192 rows in the forward and 384 in the backward; 300 rows of a step are summed in two pieces.
TEST(several_chunks) {
  each_isa([] {
    for (Rows rows : {Rows::dense, Rows::lengths, Rows::packed})
      for (bool sequence : {false, true})
        for (int64_t N : {21, 300}) {
          BnOptions o;
          o.rows = rows;
          o.sequence = sequence;
          o.reset = rows == Rows::lengths;
          o.directions = N == 21 ? 2 : 1;
          o.threads = 2;
          o.T = N == 21 ? 41 : 3;
          o.N = N;
          o.H = 7;
          check_training(o, 33);
        }
  });
}

// Above the plan's thresholds for a team, a thread without work among them.
TEST(shapes_wide_enough_for_a_team) {
  each_isa([] {
    for (bool sequence : {false, true})
      for (int64_t N : {2, 9}) {
        BnOptions o;
        o.sequence = sequence;
        o.rows = N == 9 ? Rows::lengths : Rows::dense;
        o.reset = N == 9;
        o.threads = 3;
        o.T = 4;
        o.N = N;
        o.H = N == 9 ? 65 : 129;
        BnTrial trial(o, 34);
        BnLstmForwardArgs a;
        trial.fill(a);
        CHECK_EQ(kernels().bnlstm->threads(a), 3);
        trial.run_training();
        trial.compare_forward(true);
        trial.compare_backward();
      }
  });
}

TEST(results_do_not_depend_on_threads) {
  each_isa([] {
    for (Rows rows : {Rows::lengths, Rows::packed})
      for (bool sequence : {false, true}) {
        BnOptions o;
        o.rows = rows;
        o.sequence = sequence;
        o.directions = 2;
        o.T = 5;
        o.N = 11;
        o.I = 35;
        o.H = 50;
        BnTrial alone(o, 35);
        alone.run_training();
        for (int threads : {2, 4}) {
          o.threads = threads;
          o.scattered = threads == 4;
          BnTrial other(o, 35);
          other.run_training();
          if (!alone.same_bits(other))
            check::fail(__FILE__, __LINE__, "other bits than one thread: " + o.text());
        }
      }
  });
}

int main(int argc, char** argv) { return check::run(argc, argv); }
