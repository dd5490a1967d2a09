// Philox4x32-10 against the known answers that Random123 publishes (kat_vectors), and the words of every
// instruction set against the scalar generator.
#include <vector>

#include "../cells/philox.h"
#include "../cpu/layer.h"
#include "check.h"

using namespace fastrnn;

namespace {

void expect(const uint32_t (&counter)[4], uint32_t k0, uint32_t k1, const uint32_t (&answer)[4]) {
  uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
  philox4x32(c, k0, k1);
  for (int i = 0; i < 4; i++) CHECK_EQ(c[i], answer[i]);
}

}  // namespace

TEST(known_answers) {
  expect({0, 0, 0, 0}, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  const uint32_t f = 0xffffffff;
  expect({f, f, f, f}, f, f, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  expect({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0,
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST(every_instruction_set_gives_the_scalar_words) {
  const uint64_t seed = 0x0123456789abcdefu;
  const uint32_t stream = random_stream(3, 1, Mask::zoneout_c);
  const uint64_t threshold = drop_threshold(0.3);
  const char* before = kernels().isa;
  for (const char* const* isa = available_isas(); *isa; isa++) {
    select_isa(*isa);
    for (int64_t units : {1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 1000}) {
      const int64_t T = 2, N = 3;
      std::vector<uint32_t> words(T * N * units + 1, 77);
      std::vector<uint8_t> keep(T * N * units + 1, 77);
      kernels().random({seed, stream, threshold, T, N, units}, words.data(), keep.data());
      int64_t i = 0;
      for (int64_t t = 0; t < T; t++)
        for (int64_t n = 0; n < N; n++)
          for (int64_t u = 0; u < units; u++, i++) {
            const uint32_t word = random_word(seed, stream, t, n, u);
            CHECK_EQ(words[i], word);
            CHECK_EQ(int(keep[i]), int(word >= threshold));
          }
      CHECK_EQ(words[i], 77u);
      CHECK_EQ(int(keep[i]), 77);
    }
  }
  select_isa(before);
}

TEST(thresholds_at_the_ends_are_exact) {
  CHECK_EQ(drop_threshold(0), uint64_t(0));
  CHECK_EQ(drop_threshold(1), uint64_t(1) << 32);
  CHECK_EQ(drop_threshold(0.5), uint64_t(1) << 31);
  for (double p : {0.0, 1.0}) {
    std::vector<uint8_t> keep(500, 77);
    kernels().random({5, 0, drop_threshold(p), 1, 1, 500}, nullptr, keep.data());
    for (uint8_t k : keep) CHECK_EQ(int(k), p == 0.0 ? 1 : 0);
  }
}

int main(int argc, char** argv) { return check::run(argc, argv); }
