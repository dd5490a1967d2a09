// The smallest harness that names a failure: TEST registers a function, CHECK prints what was seen
// and goes on.
#pragma once

#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitizer = true;
#else
constexpr bool kSanitizer = false;
#endif

namespace check {

struct Case {
  const char* name;
  void (*body)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int failures = 0;

inline bool add(const char* name, void (*body)()) {
  cases().push_back({name, body});
  return true;
}

inline void fail(const char* file, int line, const std::string& what) {
  ++failures;
  if (failures <= 20) std::printf("  %s:%d: %s\n", file, line, what.c_str());
}

template <class A, class B>
void equal(const char* file, int line, const char* text, const A& a, const B& b) {
  if (a == b) return;
  std::ostringstream out;
  out << text << ": got " << a << ", expected " << b;
  fail(file, line, out.str());
}

// Runs the tests whose name contains argv[1], or all; the exit status is the number of failed
// tests.
inline int run(int argc, char** argv) {
  int failed = 0;
  for (const Case& c : cases()) {
    if (argc > 1 && !std::strstr(c.name, argv[1])) continue;
    failures = 0;
    c.body();
    std::printf("%s %s\n", failures ? "FAILED" : "ok    ", c.name);
    std::fflush(stdout);
    failed += failures > 0;
  }
  return failed;
}

}  // namespace check

#define TEST(name)                                                \
  static void name();                                             \
  static const bool registered_##name = check::add(#name, &name); \
  static void name()
#define CHECK(condition) ((condition) ? void() : check::fail(__FILE__, __LINE__, "false: " #condition))
#define CHECK_EQ(a, b) check::equal(__FILE__, __LINE__, #a " == " #b, a, b)
