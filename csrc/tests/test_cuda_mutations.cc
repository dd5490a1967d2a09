// The tests of the kernels are tested: each planted error must make a trial fail, and without one all trials pass.
#include "cuda_cases.h"

using namespace trial;

static Options problem() {
  Options o;
  o.T = 6, o.N = 11, o.H = 37, o.groups = 2, o.reset = true;
  return o;
}

// Some trial of the three schedules fails, in forward or backward.
template <class Cell, class D, class T, template <class, class, int> class ExchangeOf, bool kNoisy = false>
static bool caught(Options o, Mutation m) {
  o.mutation = m;
  for (o.seed = 1; o.seed <= 3; o.seed++) {
    const Trial<Cell, D, T, ExchangeOf, false, kNoisy> trial(o);
    if (trial.failure.empty()) continue;
    std::printf("  mutation %d: %s\n", static_cast<int>(m), trial.failure.c_str());
    return true;
  }
  return false;
}

template <template <class, class, int> class ExchangeOf, int Units = 16>
static bool caught_by(Mutation m, const Options& o = problem()) {
  return caught<Lstm, Bf16, SmallTile<Bf16, Units>, ExchangeOf>(o, m);
}

TEST(nothing_is_caught_without_a_mutation) {
  CHECK(!caught_by<Sentinel>(Mutation::none));
  CHECK(!caught_by<Flags>(Mutation::none));
  CHECK(!(caught_by<Local, 48>(Mutation::none)));
  CHECK(!caught_by<Cluster>(Mutation::none));
}

TEST(synchronisation_mutations_are_caught) {
  CHECK(caught_by<Sentinel>(Mutation::dropped_barrier));
  CHECK(caught_by<Sentinel>(Mutation::single_reduction_tile));
  CHECK(caught_by<Flags>(Mutation::missing_release));
  CHECK(caught_by<Flags>(Mutation::missing_acquire));
  CHECK(caught_by<Flags>(Mutation::barrier_after_release));
  CHECK(caught_by<Cluster>(Mutation::single_cluster_tile));
  CHECK(caught_by<Cluster>(Mutation::single_expectation));
}

// What plan.h rules out: nobody waits for a CTA that publishes nothing.
TEST(a_cluster_cta_without_units_falls_behind_its_peers) {
  Options o = problem();
  o.T = 8, o.slow_factor = 4;
  CHECK(!caught_by<Cluster>(Mutation::none, o));
  o.unitless_ctas = 1;
  CHECK(caught_by<Cluster>(Mutation::none, o));
}

TEST(indexing_mutations_are_caught) {
  CHECK(caught_by<Sentinel>(Mutation::unit_tail));
  CHECK(caught_by<Sentinel>(Mutation::reduction_tail));
  CHECK(caught_by<Sentinel>(Mutation::k_permutation));
  CHECK(caught_by<Sentinel>(Mutation::reset_ignored));
  CHECK((caught<Lstm, Tf32, SmallTile<Tf32>, Sentinel>(problem(), Mutation::k_permutation)));
  CHECK((caught<Lstm, Bf16x3, SmallTile<Bf16x3>, Sentinel>(problem(), Mutation::k_permutation)));
}

TEST(mask_mutations_are_caught) {
  Options o = problem();
  o.noise.mode = fastrnn::Drop::state, o.noise.training = true, o.noise.drop = 0.3;
  CHECK(!(caught<Gru<true>, Bf16, SmallTile<Bf16>, Sentinel, true>(o, Mutation::none)));
  CHECK((caught<Gru<true>, Bf16, SmallTile<Bf16>, Sentinel, true>(o, Mutation::other_step_mask)));
}

TEST(a_dropped_cta_is_reported_as_a_deadlock) {
  Options o = problem();
  o.dropped_ctas = 1;
  for (const int slow : {1, 4}) {
    o.slow_factor = slow;
    const Trial<Lstm, Bf16, SmallTile<Bf16>, Sentinel> trial(o);
    CHECK(trial.failure.find("deadlock") != std::string::npos);
    CHECK(trial.failure.find("threads at mail") != std::string::npos);
  }
}

template <template <class, class, int> class ExchangeOf>
static void gives_up_instead_of_hanging() {
  Options o = problem();
  o.gives_up = true;
  CHECK_EQ((Trial<Lstm, Bf16, SmallTile<Bf16>, ExchangeOf>(o).error), 0u);
  o.dropped_ctas = 1;
  const Trial<Lstm, Bf16, SmallTile<Bf16>, ExchangeOf> trial(o);
  CHECK_EQ(trial.error, 1u);
  CHECK(trial.failure.find("deadlock") == std::string::npos);
}
TEST(a_missing_cta_sets_the_error_word) {
  gives_up_instead_of_hanging<Sentinel>();
  gives_up_instead_of_hanging<Flags>();
}

int main(int argc, char** argv) { return check::run(argc, argv); }
