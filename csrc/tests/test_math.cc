// The activations of csrc/cpu/math.h on every float: quotients without a division must be what division gives, and
// sigmoid and tanh must be as close to the truth as docs/cpu-kernels.md says.
#if defined(__AVX2__)
#define FASTRNN_ISA_NAME test_math
#include "../cpu/math.h"

#include <cmath>
#include <cstdio>
#include <cstring>

using namespace fastrnn::isa_test_math;
using V = Vec<float>;
using Math = Act<V, false>;
using Sharp = Act<V, false, true>;

namespace {

constexpr int W = V::W;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kStride = W * 1009;  // a sample: sanitized code is slow and the arithmetic is the same
#elif defined(__AVX512F__) && !defined(FASTRNN_EMULATE_AVX512)
constexpr uint64_t kStride = W;
#else
constexpr uint64_t kStride = W * 61;  // a sample: these quotients are divisions, or emulated
#endif

struct Counts {
  long sigmoid = 0, tanh = 0;
  double sigmoid_error = 0, tanh_error = 0, sharp_error = 0, relative = 0;
};

// The quotients of sigmoid and tanh as Math takes them, and what division makes of them.
void both_ways(V x, V (&fast)[2], float (&exact)[2][W]) {
  const V one = V::set1(1.f);
  V arg[2] = {V::min(V::set1(87.f), V::max(V::set1(-87.f), x)),
              V::min(V::set1(10.f), V::max(V::set1(-10.f), x))};
  const float scale[2] = {-1.44269504f, 2.88539008f};
  V shifted[2], q[2];
  exp2_parts(arg, scale, shifted, q);
  const V p = V::times2(one, shifted[1]), scale0 = V::times2(one, shifted[0]);
  V above[2] = {one, V::fma(p, q[1], p - one)};
  fast[0] = one + V::fma(scale0, q[0], scale0);
  fast[1] = above[1] + V::set1(2.f);
  for (int k = 0; k < 2; k++) {
    float a[W], b[W];
    V::store(a, above[k]);
    V::store(b, fast[k]);
    for (int i = 0; i < W; i++) exact[k][i] = a[i] / b[i];
  }
  V::template quotients<1, 1>(above, fast);
}

Counts look_at_every_float() {
  Counts c;
  for (uint64_t u = 0; u < (1ull << 32); u += kStride) {
    float x[W], s[W], t[W], exact[2][W];
    for (int i = 0; i < W; i++) {
      const uint32_t bits = static_cast<uint32_t>(u + i);
      std::memcpy(x + i, &bits, 4);
    }
    if (!(std::fabs(x[0]) <= 200)) continue;
    V fast[2];
    both_ways(V::load(x), fast, exact);
    V::store(s, fast[0]);
    V::store(t, fast[1]);
    for (int i = 0; i < W; i++) {
      c.sigmoid += s[i] != exact[0][i];
      c.tanh += t[i] != exact[1][i];
    }
    if (kStride == W && u / W % 61 != 0) continue;
    V a[1] = {V::load(x)}, b[1] = {a[0]}, sharp[1] = {a[0]};
    Math::both(a, b);
    Sharp::tanhs(sharp);
    V::store(s, a[0]);
    const double at = x[3], truth = std::tanh(at);
    c.sigmoid_error = std::fmax(c.sigmoid_error, std::fabs(s[3] - 1 / (1 + std::exp(-at))));
    V::store(t, b[0]);
    c.tanh_error = std::fmax(c.tanh_error, std::fabs(t[3] - truth));
    // Below the smallest normal number a spacing is no longer a share of the value.
    if (std::fabs(truth) > 1.2e-38) c.relative = std::fmax(c.relative, std::fabs(t[3] / truth - 1));
    V::store(t, sharp[0]);
    c.sharp_error = std::fmax(c.sharp_error, std::fabs(t[3] - truth));
    if (std::fabs(truth) > 1.2e-38) c.relative = std::fmax(c.relative, std::fabs(t[3] / truth - 1));
  }
  return c;
}

template <class M>
bool special_values() {
  float odd[16] = {INFINITY, -INFINITY, NAN, 0.f, -0.f, 100.f, -100.f, 1e-40f}, s[W], t[W];
  V a[1] = {V::load(odd)}, b[1] = {a[0]};
  M::both(a, b);
  V::store(s, a[0]);
  V::store(t, b[0]);
  return s[0] == 1 && s[1] < 1e-37f && std::isnan(s[2]) && s[3] == 0.5f && t[0] == 1 && t[1] == -1 &&
         std::isnan(t[2]) && t[3] == 0 && t[7] == 1e-40f;
}

// NaN stays NaN whatever its other bits say: uninitialised memory is often 0xffffffff.
template <class M>
bool every_nan() {
  const uint32_t values[] = {0x7fc00000u, 0x7fc00001u, 0x7fc000ffu, 0x7f800001u, 0xffc00001u, 0xffffffffu};
  for (const uint32_t bits : values) {
    float x[W], s[W], t[W];
    for (int i = 0; i < W; i++) std::memcpy(x + i, &bits, 4);
    V a[1] = {V::load(x)}, b[1] = {a[0]};
    M::both(a, b);
    V::store(s, a[0]);
    V::store(t, b[0]);
    for (int i = 0; i < W; i++)
      if (!std::isnan(s[i]) || !std::isnan(t[i])) return false;
  }
  return true;
}

}  // namespace

int main() {
#if defined(__AVX512F__) && !defined(FASTRNN_EMULATE_AVX512)
  if (!__builtin_cpu_supports("avx512dq")) {
    std::printf("skipped: this CPU has no AVX-512\n");
    return 0;
  }
#else
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::printf("skipped: this CPU has no AVX2 and FMA\n");
    return 0;
  }
#endif
  const Counts c = look_at_every_float();
  std::printf(
      "quotients that differ from division: sigmoid %ld, tanh %ld; error: sigmoid %.2e, tanh %.2e, "
      "sharp %.2e, relative %.2e\n",
      c.sigmoid, c.tanh, c.sigmoid_error, c.tanh_error, c.sharp_error, c.relative);
  const bool ok = c.sigmoid == 0 && c.tanh <= 2 && c.sigmoid_error < 1e-7 && c.tanh_error < 1.6e-7 &&
                  c.sharp_error < 8.9e-8 && c.relative < 3e-7;
  const bool special =
      special_values<Math>() && special_values<Sharp>() && every_nan<Math>() && every_nan<Sharp>();
  std::printf("special values %s\n", special ? "ok" : "WRONG");
  return ok && special ? 0 : 1;
}
#else
#include <cstdio>
// Built with AVX-512 or AVX2 flags where the compiler has them (CMakeLists.txt).
int main() { std::printf("skipped: built without AVX2\n"); }
#endif
