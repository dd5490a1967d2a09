// The probes' bodies on the emulator: their host computations and their protocols are right, so that on a GPU a red probe
// means a wrapper.
#include "../cuda/probes/hops.cuh"
#include "../cuda/probes/wrappers.cuh"
#include "check.h"

using namespace fastrnn::cuda;
using namespace fastrnn::cuda::probes;

template <class Kernel>
static std::string run_emulated(const Launch& launch, uint64_t seed, Kernel kernel) {
  emu::Launch l;
  l.grid = launch.grid, l.block = launch.block, l.shared_bytes = launch.shared, l.cluster = launch.cluster;
  l.seed = seed;
  return emu::launch(l, kernel).error;
}

TEST(wrappers_give_what_the_host_computes) {
  each_wrapper([](auto body) {
    using Body = decltype(body);
    for (uint64_t seed : {1, 2, 3}) {
      const Words in = Body::in();
      Words out(Body::out_words(), Body::kFill);
      const std::string error =
          run_emulated(Body::kLaunch, seed, [&] { wrapper_kernel<Body>(in.data(), out.data()); });
      CHECK_EQ(std::string(Body::kName) + ": " + error + Body::judge(in, out),
               std::string(Body::kName) + ": ");
    }
  });
}

TEST(judges_see_a_wrong_word) {
  each_wrapper([](auto body) {
    using Body = decltype(body);
    const Words in = Body::in();
    Words out(Body::out_words(), Body::kFill);
    run_emulated(Body::kLaunch, 1, [&] { wrapper_kernel<Body>(in.data(), out.data()); });
    out[out.size() - 1] ^= 0x00400000u;
    CHECK(!Body::judge(in, out).empty());
  });
}

template <class Hop>
static void hops_arrive(int ctas, int cluster) {
  for (uint64_t seed : {1, 2}) {
    HopParams p;
    p.steps = 5, p.ctas = ctas;
    Words mail(Hop::words(p), Hop::kFill), flags(ctas * kFlagStride), results(ctas * kResultWords);
    p.mail = mail.data(), p.flags = flags.data(), p.results = results.data();
    const Launch launch{ctas, kHopThreads, Hop::shared(p), cluster};
    CHECK_EQ(run_emulated(launch, seed, [&] { hop_kernel<Hop>(p); }), std::string());
    for (int c = 0; c < ctas; c++) CHECK_EQ(results[c * kResultWords], expected_sum(p));
  }
}

TEST(every_hop_brings_every_word) {
  for (int ctas : {1, 2, 5, 9}) {
    hops_arrive<SentinelHop>(ctas, 1);
    hops_arrive<FlagHop>(ctas, 1);
  }
  for (int ctas : {2, 3, 4, 8}) hops_arrive<ClusterHop>(ctas, ctas);
}

int main(int argc, char** argv) { return check::run(argc, argv); }
