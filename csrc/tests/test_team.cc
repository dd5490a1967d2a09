// The thread team: every kind, sizes above the number of cores, nesting, concurrent callers, fork,
// idling.
#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>

#include "../cpu/team.h"
#include "check.h"

namespace {

using fastrnn::Barrier;
using fastrnn::team;
using fastrnn::team_configure;
using fastrnn::team_kind;

bool have_gomp = false;

// Runs body under each kind of team there is in this process.
template <class F>
void each_kind(F body) {
  for (const char* kind : {"own", "gomp", "caller", "auto"}) {
    if (!have_gomp && !std::strcmp(kind, "gomp")) continue;
    team_configure(kind);
    body();
  }
}

// Runs body in a forked child; true if it ended with no failed check within 30 s.
template <class F>
bool passes_in_child(F body) {
  std::fflush(stdout);
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(30);
    check::failures = 0;
    body();
    std::fflush(stdout);
    _exit(check::failures ? 1 : 0);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

double process_cpu_seconds() {
  rusage use;
  getrusage(RUSAGE_SELF, &use);
  const auto seconds = [](timeval t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(use.ru_utime) + seconds(use.ru_stime);
}

// A run with a barrier in the middle: the sum of what all members wrote before it, seen by each.
int sum_across_barrier(int threads) {
  Barrier barrier;
  std::array<int, 64> slot{};
  std::atomic<int> wrong{0};
  int members = 0;
  team(threads, [&](int tid, int nt) {
    if (tid == 0) members = nt;
    for (int phase = 1; phase <= 20; ++phase) {
      slot[tid] = phase;
      barrier.wait(nt);
      int sum = 0;
      for (int i = 0; i < nt; ++i) sum += slot[i];
      if (sum != phase * nt) wrong.fetch_add(1);
      barrier.wait(nt);
    }
  });
  return wrong.load() == 0 ? members : -1;
}

}  // namespace

TEST(every_member_runs_once) {
  each_kind([] {
    for (int threads : {-1, 0, 1, 2, 3, 4, 7, 2, 9, 1, 5}) {
      std::array<std::atomic<int>, 16> count{};
      std::array<int, 16> width{};
      const auto caller = std::this_thread::get_id();
      team(threads, [&](int tid, int nt) {
        count[tid].fetch_add(1);
        width[tid] = nt;
        if (tid == 0) CHECK(std::this_thread::get_id() == caller);
      });
      const int nt = width[0];
      CHECK(nt >= 1 && nt <= std::max(threads, 1));
      for (int i = 0; i < 16; ++i) CHECK_EQ(count[i].load(), i < nt ? 1 : 0);
      for (int i = 0; i < nt; ++i) CHECK_EQ(width[i], nt);
      const bool alone = !std::strcmp(team_kind(), "caller only");
      CHECK_EQ(nt, alone ? 1 : std::max(threads, 1));
    }
  });
}

TEST(caller_sees_what_members_wrote) {
  each_kind([] {
    for (int round = 0; round < 500; ++round) {
      std::array<int, 8> slot{};
      int members = 0;
      team(4, [&](int tid, int nt) {
        slot[tid] = round + tid;
        if (tid == 0) members = nt;
      });
      for (int i = 0; i < members; ++i) CHECK_EQ(slot[i], round + i);
    }
  });
}

TEST(nested_run_stays_on_its_thread) {
  each_kind([] {
    std::atomic<int> inner{0}, wide{0};
    std::atomic<int> outer{0};
    team(3, [&](int, int nt) {
      if (nt > 0) outer.fetch_add(1);
      const auto self = std::this_thread::get_id();
      team(4, [&](int tid, int n) {
        inner.fetch_add(1);
        if (n != 1 || tid != 0 || std::this_thread::get_id() != self) wide.fetch_add(1);
      });
    });
    CHECK_EQ(inner.load(), outer.load());
    CHECK_EQ(wide.load(), 0);
  });
}

TEST(barrier_separates_phases) {
  each_kind([] {
    Barrier barrier;
    for (int threads : {1, 2, 3, 5, 2, 1, 4}) {
      const int phases = kThreadSanitizer || threads > 2 ? 300 : 5000;
      std::array<int, 8> slot{};
      std::atomic<int> wrong{0};
      team(threads, [&](int tid, int nt) {
        for (int phase = 1; phase <= phases; ++phase) {
          slot[tid] = phase;
          barrier.wait(nt);
          for (int i = 0; i < nt; ++i) wrong.fetch_add(slot[i] != phase, std::memory_order_relaxed);
          barrier.wait(nt);
        }
      });
      CHECK_EQ(wrong.load(), 0);
    }
    barrier.reset();
    int after = 0;
    team(2, [&](int tid, int nt) {
      barrier.wait(nt);
      if (tid == 0) after = 1;
    });
    CHECK_EQ(after, 1);
  });
}

TEST(concurrent_callers_get_right_results) {
  each_kind([] {
    std::array<std::thread, 8> callers;
    std::atomic<int> wrong{0};
    for (auto& caller : callers) {
      caller = std::thread([&, threads = 1 + static_cast<int>(&caller - callers.data()) % 4] {
        for (int round = 0; round < 30; ++round) wrong.fetch_add(sum_across_barrier(threads) < 1);
      });
    }
    for (auto& caller : callers) caller.join();
    CHECK_EQ(wrong.load(), 0);
    // The cores are free again: a later run gets its members.
    const bool alone = !std::strcmp(team_kind(), "caller only");
    CHECK_EQ(sum_across_barrier(2), alone ? 1 : 2);
  });
}

TEST(child_of_fork_has_a_team_of_its_own) {
  if (kThreadSanitizer) return;  // which supports no new threads in the child of a threaded process
  each_kind([] {
    const bool alone = !std::strcmp(team_kind(), "caller only");
    const int expected = alone ? 1 : 3;
    CHECK_EQ(sum_across_barrier(3), expected);
    CHECK(passes_in_child([&] {
      CHECK_EQ(std::string(team_kind()), alone ? "caller only" : "own pool");
      CHECK_EQ(sum_across_barrier(3), expected);
      CHECK_EQ(sum_across_barrier(2), alone ? 1 : 2);
      CHECK(passes_in_child([&] { CHECK_EQ(sum_across_barrier(3), expected); }));
      bool refused = false;
      try {
        team_configure("gomp");
      } catch (const std::runtime_error&) {
        refused = true;
      }
      CHECK(refused);
    }));
    CHECK_EQ(sum_across_barrier(3), expected);
  });
}

TEST(fork_while_another_thread_runs) {
  if (kThreadSanitizer) return;
  team_configure("own");
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) sum_across_barrier(2);
  });
  for (int i = 0; i < 10; ++i) CHECK(passes_in_child([] { CHECK_EQ(sum_across_barrier(2), 2); }));
  stop = true;
  busy.join();
}

TEST(run_goes_on_when_threads_cannot_be_had) {
  if (kSanitizer) return;  // needs a limit on address space, which the sanitizers' shadow exceeds
  team_configure("own");
  CHECK(passes_in_child([] {
    const rlimit now{64 << 20, 64 << 20};
    setrlimit(RLIMIT_AS, &now);
    const int members = sum_across_barrier(40);
    CHECK(members >= 1 && members < 40);
    CHECK_EQ(sum_across_barrier(40) >= 1, true);
  }));
}

TEST(idle_workers_are_parked) {
  team_configure("own");
  CHECK(sum_across_barrier(4) >= 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const double before = process_cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  CHECK(process_cpu_seconds() - before < 0.01);
  // and wake up again
  CHECK_EQ(sum_across_barrier(4), 4);
}

TEST(unknown_kind_is_refused) {
  team_configure("own");
  for (const char* word : {"", "openmp", "Auto", static_cast<const char*>(nullptr)}) {
    bool refused = false;
    try {
      team_configure(word);
    } catch (const std::invalid_argument& error) {
      refused = std::string(error.what()).find("auto, own, gomp or caller") != std::string::npos;
    }
    CHECK(refused);
  }
  CHECK_EQ(std::string(team_kind()), "own pool");
}

int main(int argc, char** argv) {
  // ThreadSanitizer cannot see how libgomp synchronises, so only the own pool is checked with it.
  if (!kThreadSanitizer) have_gomp = dlopen("libgomp.so.1", RTLD_NOW) != nullptr;
  std::printf("libgomp: %s\n", have_gomp ? "loaded" : "none");
  return check::run(argc, argv);
}
