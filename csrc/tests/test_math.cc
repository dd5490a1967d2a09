// The activations of csrc/cpu/math.h on every float: quotients without a division must be what division gives, and
// sigmoid and tanh must be as close to the truth as docs/cpu-kernels.md says.
#if defined(__AVX512F__)
#define FASTRNN_ISA_NAME test_math
#include "../cpu/math.h"

#include <cmath>
#include <cstdio>
#include <cstring>

using namespace fastrnn::isa_test_math;
using V = Vec<float>;
using Math = Act<V, false>;

namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kStride = 16 * 1009;  // a sample: sanitized code is slow and the arithmetic is the same
#else
constexpr uint64_t kStride = 16;
#endif

struct Counts {
  long sigmoid = 0, tanh = 0;
  double sigmoid_error = 0, tanh_error = 0;
};

// The same formulas with vdivps.
void with_division(V x, float* sigmoid, float* tanh) {
  const V one = V::set1(1.f);
  V arg[2] = {V::min(V::set1(87.f), V::max(V::set1(-87.f), x)),
              V::min(V::set1(10.f), V::max(V::set1(-10.f), x))};
  const float scale[2] = {-1.44269504f, 2.88539008f};
  V shifted[2], q[2];
  exp2_parts(arg, scale, shifted, q);
  V d = one + V::times2(one + q[0], shifted[0]);
  V p = V::times2(one, shifted[1]);
  V em1 = V::fma(p, q[1], p - one);
  _mm512_storeu_ps(sigmoid, _mm512_div_ps(one.v, d.v));
  _mm512_storeu_ps(tanh, _mm512_div_ps(em1.v, (em1 + V::set1(2.f)).v));
}

Counts look_at_every_float() {
  Counts c;
  for (uint64_t u = 0; u < (1ull << 32); u += kStride) {
    float x[16], s[16], t[16], ds[16], dt[16];
    for (int i = 0; i < 16; i++) {
      const uint32_t bits = static_cast<uint32_t>(u + i);
      std::memcpy(x + i, &bits, 4);
    }
    if (!(std::fabs(x[0]) <= 200)) continue;
    V a[1] = {V::load(x)}, b[1] = {a[0]};
    with_division(a[0], ds, dt);
    Math::both(a, b);
    V::store(s, a[0]);
    V::store(t, b[0]);
    for (int i = 0; i < 16; i++) {
      c.sigmoid += s[i] != ds[i];
      c.tanh += t[i] != dt[i];
    }
    if (u / kStride % 61 == 0) {
      const double truth = x[3];
      c.sigmoid_error = std::fmax(c.sigmoid_error, std::fabs(s[3] - 1 / (1 + std::exp(-truth))));
      c.tanh_error = std::fmax(c.tanh_error, std::fabs(t[3] - std::tanh(truth)));
    }
  }
  return c;
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx512dq")) {
    std::printf("skipped: this CPU has no AVX-512\n");
    return 0;
  }
  const Counts c = look_at_every_float();
  std::printf("differs from division: sigmoid %ld, tanh %ld; error: sigmoid %.2e, tanh %.2e\n", c.sigmoid,
              c.tanh, c.sigmoid_error, c.tanh_error);
  const bool ok = c.sigmoid == 0 && c.tanh <= 2 && c.sigmoid_error < 1e-7 && c.tanh_error < 1.6e-7;
  float odd[16] = {INFINITY, -INFINITY, NAN, 0.f, -0.f, 100.f, -100.f, 1e-40f}, s[16], t[16];
  V a[1] = {V::load(odd)}, b[1] = {a[0]};
  Math::both(a, b);
  V::store(s, a[0]);
  V::store(t, b[0]);
  const bool special = s[0] == 1 && s[1] < 1e-37f && std::isnan(s[2]) && s[3] == 0.5f && t[0] == 1 &&
                       t[1] == -1 && std::isnan(t[2]) && t[3] == 0 && t[7] == 1e-40f;
  std::printf("special values %s\n", special ? "ok" : "WRONG");
  return ok && special ? 0 : 1;
}
#else
#include <cstdio>
// Built with AVX-512 flags where the compiler has them (CMakeLists.txt).
int main() { std::printf("skipped: built without AVX-512\n"); }
#endif
