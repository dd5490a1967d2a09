// Chooses the instruction set at run time: CPUID, or FASTRNN_ISA, which announces itself.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "layer.h"

namespace fastrnn {

int tape_slots(Cell cell) {
  switch (cell) {
    case Cell::lstm:
    case Cell::gru:
      return 4;
    case Cell::gru_reset_before:
      return 3;
    case Cell::lstm_layer_norm:
      return 8;
    case Cell::gru_layer_norm:
      return 6;
    default:
      return 0;
  }
}

#define FASTRNN_DECLARE(isa)    \
  namespace isa_##isa {         \
    extern const Kernels table; \
  }
// FASTRNN_HAVE_*: the sets this build was given objects for (CMakeLists.txt).
#if FASTRNN_HAVE_BASELINE
FASTRNN_DECLARE(baseline)
#endif
#if FASTRNN_HAVE_AVX512
FASTRNN_DECLARE(avx512)
#endif
#if FASTRNN_HAVE_AVX2
FASTRNN_DECLARE(avx2)
#endif
#if FASTRNN_HAVE_AVX512BF16
namespace isa_avx512bf16 {
size_t layer_forward_workspace(const ForwardArgs&);
void layer_forward(const ForwardArgs&);
}  // namespace isa_avx512bf16
#endif

namespace {

#if FASTRNN_HAVE_AVX512BF16
// AVX-512 with dot products of bfloat16 pairs where operands are bfloat16: the forward of those types. (Gradients are
// computed in float.)
const Kernels& avx512bf16() {
  static const Kernels all = [] {
    Kernels k = isa_avx512::table;
    k.isa = "avx512bf16";
    k.forward_workspace = [](const ForwardArgs& a) {
      return multiplies_bf16(a.type) ? isa_avx512bf16::layer_forward_workspace(a)
                                     : isa_avx512::table.forward_workspace(a);
    };
    k.forward = [](const ForwardArgs& a) {
      multiplies_bf16(a.type) ? isa_avx512bf16::layer_forward(a) : isa_avx512::table.forward(a);
    };
    return k;
  }();
  return all;
}
#endif

struct Entry {
  const Kernels* kernels;
  bool usable;
};

constexpr int kEntries = 4;

struct Registry {
  Entry entries[kEntries];
  const char* names[kEntries + 1] = {};
  int count = 0;
  std::atomic<const Kernels*> chosen{nullptr};

  void add(const Kernels& k, bool usable) {
    if (usable) names[count] = k.isa, entries[count++] = {&k, usable};
  }
  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; i++)
      if (std::strcmp(entries[i].kernels->isa, name) == 0) return entries[i].kernels;
    return nullptr;
  }
  Registry() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(FASTRNN_EMULATE_AVX512)
    [[maybe_unused]] const bool avx512 = avx2, dot = avx2;
#else
    [[maybe_unused]] const bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    // vdpbf16ps pays on AMD; on Intel it measured up to 1.5 times slower than widening and two FMAs.
    [[maybe_unused]] const bool dot = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    [[maybe_unused]] const bool dot_first = __builtin_cpu_is("amd");
#if FASTRNN_HAVE_AVX512BF16
    add(avx512bf16(), dot && dot_first);
#endif
#if FASTRNN_HAVE_AVX512
    add(isa_avx512::table, avx512);
#endif
#if FASTRNN_HAVE_AVX512BF16
    add(avx512bf16(), dot && !dot_first);
#endif
#if FASTRNN_HAVE_AVX2
    add(isa_avx2::table, avx2);
#endif
#endif
#if FASTRNN_HAVE_BASELINE
    add(isa_baseline::table, true);
#endif
    chosen = entries[0].kernels;
    const char* wanted = std::getenv("FASTRNN_ISA");
    if (!wanted || !*wanted) return;
    if (const Kernels* k = find(wanted)) {
      chosen = k;
      std::fprintf(stderr, "fastrnn: instruction set %s, because FASTRNN_ISA is set; unset it to use %s\n",
                   wanted, names[0]);
    } else {
      std::fprintf(stderr,
                   "fastrnn: FASTRNN_ISA=%s is unknown or not on this machine; using %s. Available:", wanted,
                   names[0]);
      for (int i = 0; i < count; i++) std::fprintf(stderr, " %s", names[i]);
      std::fprintf(stderr, "\n");
    }
  }
};

Registry& registry() {
  static Registry r;
  return r;
}

}  // namespace

const char* cpu_vendor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "";
}

const Kernels& kernels() { return *registry().chosen.load(std::memory_order_acquire); }
const char* const* available_isas() { return registry().names; }
bool select_isa(const char* name) {
  const Kernels* k = registry().find(name);
  if (k) registry().chosen.store(k, std::memory_order_release);
  return k != nullptr;
}

}  // namespace fastrnn
