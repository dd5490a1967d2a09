#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace fastrnn {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// A waiting member of a run: long enough for what members differ by in an undisturbed step.
constexpr auto kSpinInRun = microseconds(100);
// More members than cores: whoever is waited for needs the core of one who waits.
constexpr auto kSpinCrowded = microseconds(2);
// An idle worker of the own pool: longer would take a core from torch's next operation.
constexpr auto kSpinIdle = microseconds(10);
// `pause` takes 40 to 140 cycles by CPU, so spinning is bounded by time, read once per burst.
constexpr int kPausesPerBurst = 32;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// Polls ready() for about `limit`; false if it stayed false.
template <class Ready>
bool spin(Clock::duration limit, Ready ready) {
  for (int i = 0; i < kPausesPerBurst; ++i) {
    if (ready()) return true;
    relax();
  }
  const auto deadline = Clock::now() + limit;
  do {
    for (int i = 0; i < kPausesPerBurst; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (Clock::now() < deadline);
  return ready();
}

// Cores this process may use.
int count_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? static_cast<int>(n) : 1;
}

int cores() {
  static const int n = count_cores();
  return n;
}

template <class Ready>
void spin_in_run(int members, Ready ready) {
  const auto limit = members > cores() ? kSpinCrowded : kSpinInRun;
  // Sleeping, if only for the timer's slack (50 us), empties the core, and the scheduler moves the preempted member
  // there at once. sched_yield does neither, and was up to ten times slower beside other processes.
  while (!spin(limit, ready)) std::this_thread::sleep_for(std::chrono::nanoseconds(1));
}

thread_local bool inside_job = false;

void run_member(TeamJob job, int tid, int nt, void* arg) {
  const bool outer = inside_job;
  inside_job = true;
  job(tid, nt, arg);
  inside_job = outer;
}

// ---- own pool

class Worker {
 public:
  // Starts run `ticket`: what the caller wrote before is visible to the worker.
  void post(unsigned ticket) {
    posted_.store(ticket, std::memory_order_seq_cst);
    // Either this load sees the worker parked or the worker's check sees the ticket: both are
    // seq_cst.
    if (parked_.load(std::memory_order_seq_cst)) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_one();
    }
  }

  // Returns the next ticket after `seen`.
  unsigned wait(unsigned seen) {
    const auto arrived = [&] { return posted_.load(std::memory_order_seq_cst) != seen; };
    if (!spin(kSpinIdle, arrived)) {
      std::unique_lock<std::mutex> lock(mutex_);
      parked_.store(true, std::memory_order_seq_cst);
      wake_.wait(lock, arrived);
      parked_.store(false, std::memory_order_relaxed);
    }
    return posted_.load(std::memory_order_acquire);
  }

 private:
  alignas(64) std::atomic<unsigned> posted_{0};
  std::atomic<bool> parked_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Workers are detached and a pool is never destroyed: nothing at exit waits for them.
class Pool {
 public:
  // One run at a time, which the caller sees to.
  void run(int threads, TeamJob job, void* arg) {
    grow(threads - 1);
    const int helpers = std::min(threads - 1, static_cast<int>(workers_.size()));
    job_ = job;
    arg_ = arg;
    members_ = helpers + 1;
    running_.store(helpers, std::memory_order_relaxed);
    ++ticket_;
    for (int i = 0; i < helpers; ++i) workers_[i]->post(ticket_);
    run_member(job, 0, helpers + 1, arg);
    spin_in_run(helpers + 1, [&] { return running_.load(std::memory_order_acquire) == 0; });
  }

 private:
  void grow(int wanted) {
    // A worker must not receive the signals that the host program handles in its own threads.
    if (static_cast<int>(workers_.size()) >= wanted) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      while (static_cast<int>(workers_.size()) < wanted) {
        auto worker = std::make_unique<Worker>();
        Worker* address = worker.get();
        const int tid = static_cast<int>(workers_.size()) + 1;
        workers_.reserve(workers_.size() + 1);
        std::thread([this, address, tid, seen = 0u] { work(address, tid, seen); }).detach();
        workers_.push_back(std::move(worker));
      }
    } catch (const std::system_error&) {
      // No more threads to be had: the run goes on with those there are.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void work(Worker* self, int tid, unsigned seen) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "fastrnn");
#endif
    for (;;) {
      seen = self->wait(seen);
      run_member(job_, tid, members_, arg_);
      running_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  TeamJob job_ = nullptr;
  void* arg_ = nullptr;
  int members_ = 0;
  unsigned ticket_ = 0;
  alignas(64) std::atomic<int> running_{0};
};

// ---- borrowed libgomp

struct Gomp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*max_threads)() = nullptr;
  explicit operator bool() const { return parallel && thread_num && num_threads && max_threads; }
};

#if defined(__linux__)
bool name_starts(const char* path, const char* prefix) {
  const char* slash = std::strrchr(path, '/');
  return std::strncmp(slash ? slash + 1 : path, prefix, std::strlen(prefix)) == 0;
}

std::string loaded_library(const char* prefix) {
  struct Search {
    const char* prefix;
    std::string path;
  } search{prefix, {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto* s = static_cast<Search*>(data);
        if (!info->dlpi_name || !name_starts(info->dlpi_name, s->prefix)) return 0;
        s->path = info->dlpi_name;
        return 1;
      },
      &search);
  return search.path;
}

// The entry points as seen from an already loaded library; empty unless libgomp itself provides
// them.
Gomp gomp_seen_from(const char* prefix) {
  const std::string path = loaded_library(prefix);
  if (path.empty()) return {};
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!library) return {};
  Gomp gomp;
  gomp.parallel = reinterpret_cast<decltype(gomp.parallel)>(dlsym(library, "GOMP_parallel"));
  gomp.thread_num = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_thread_num"));
  gomp.num_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_num_threads"));
  gomp.max_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_max_threads"));
  Dl_info origin;
  // libiomp5 offers the same names; how it behaves when borrowed has not been measured.
  if (!gomp || !dladdr(reinterpret_cast<void*>(gomp.parallel), &origin) || !origin.dli_fname ||
      !name_starts(origin.dli_fname, "libgomp"))
    return {};
  return gomp;  // The handle stays open: the runtime must outlive our use of it.
}

// torch's own runtime first: other packages (scikit-learn) bring a libgomp under another name.
Gomp find_gomp() {
  if (Gomp gomp = gomp_seen_from("libtorch_cpu.so")) return gomp;
  if (!loaded_library("libtorch_cpu.so").empty()) return {};
  return gomp_seen_from("libgomp");
}
#else
Gomp find_gomp() { return {}; }
#endif

const Gomp& gomp() {
  static const Gomp found = find_gomp();
  return found;
}

struct Borrowed {
  TeamJob job;
  void* arg;
  int wanted;
};

void borrowed_member(void* data) {
  const auto* b = static_cast<const Borrowed*>(data);
  const int tid = gomp().thread_num();
  const int nt = std::min(gomp().num_threads(), b->wanted);
  if (tid < nt) run_member(b->job, tid, nt, b->arg);
}

void run_borrowed(int threads, TeamJob job, void* arg) {
  Borrowed b{job, arg, threads};
  // A region narrower than torch's would make libgomp end the surplus threads, and torch's next one
  // start them again; so the width is torch's and the surplus members return at once.
  const int width = std::max(threads, gomp().max_threads());
  gomp().parallel(borrowed_member, &b, static_cast<unsigned>(width), 0);
}

// ---- choice and occupancy

enum class Kind { kAuto, kOwn, kGomp, kCaller };

bool parse(const char* word, Kind* kind) {
  if (!std::strcmp(word, "auto"))
    *kind = Kind::kAuto;
  else if (!std::strcmp(word, "own"))
    *kind = Kind::kOwn;
  else if (!std::strcmp(word, "gomp"))
    *kind = Kind::kGomp;
  else if (!std::strcmp(word, "caller"))
    *kind = Kind::kCaller;
  else
    return false;
  return true;
}

struct State {
  std::atomic<Kind> kind{Kind::kAuto};
  std::atomic<bool> forked{false};
  std::atomic<int> occupied{0};  // members of all runs in progress
  std::atomic<bool> pool_busy{false};
  std::atomic<Pool*> pool{nullptr};
};

State* state_ptr() {
  static State* state = nullptr;
  static std::once_flag once;
  std::call_once(once, [] {
    state = new State;  // never freed: workers and late callers may outlive static destructors
    if (const char* word = std::getenv("FASTRNN_TEAM")) {
      Kind kind = Kind::kAuto;
      if (!parse(word, &kind))
        std::fprintf(stderr, "fastrnn: FASTRNN_TEAM=%s ignored: expected auto, own, gomp or caller\n", word);
      state->kind = kind;
    }
    // The child has none of the parent's threads: libgomp would wait for its own forever, and so
    // would our pool.
    pthread_atfork(nullptr, nullptr, [] {
      state->forked = true;
      state->occupied = 0;
      state->pool_busy = false;
      state->pool = nullptr;
    });
#if defined(__linux__)
    // Detached workers run this code: it must stay mapped even if the library is closed.
    Dl_info self;
    if (dladdr(reinterpret_cast<void*>(&team_kind), &self) && self.dli_fname)
      dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
#endif
  });
  return state;
}

State& state() { return *state_ptr(); }

Kind kind_now() {
  const Kind kind = state().kind.load(std::memory_order_relaxed);
  if (kind == Kind::kOwn || kind == Kind::kCaller) return kind;
  if (state().forked.load(std::memory_order_relaxed)) return Kind::kOwn;
  return gomp() ? Kind::kGomp : Kind::kOwn;
}

}  // namespace

void Barrier::meet(int count) { linger(count, arrive(count)); }

std::uint64_t Barrier::arrive(int count) {
  const std::uint64_t before = state_.fetch_add(1, std::memory_order_acq_rel);
  const std::uint64_t phase = before >> 32;
  if (static_cast<std::uint32_t>(before) + 1 == static_cast<std::uint32_t>(count))
    state_.store((phase + 1) << 32, std::memory_order_release);
  return phase;
}

void Barrier::linger(int count, std::uint64_t phase) const {
  if (!passed(phase)) spin_in_run(count, [&] { return passed(phase); });
}

void team_run(int threads, TeamJob job, void* arg) {
  if (threads <= 1 || inside_job) return run_member(job, 0, 1, arg);
  State& s = state();
  // Members that meet at a barrier every step must all be running: beside another run that fills
  // the cores, one thread alone is faster than a team that waits for time slices.
  const int others = s.occupied.fetch_add(threads, std::memory_order_relaxed);
  const Kind kind = others > 0 && others + threads > cores() ? Kind::kCaller : kind_now();
  bool expected = false;
  if (kind == Kind::kGomp) {
    run_borrowed(threads, job, arg);
  } else if (kind == Kind::kOwn &&
             s.pool_busy.compare_exchange_strong(expected, true, std::memory_order_acquire)) {
    Pool* pool = s.pool.load(std::memory_order_relaxed);
    if (!pool) s.pool.store(pool = new Pool, std::memory_order_relaxed);
    pool->run(threads, job, arg);
    s.pool_busy.store(false, std::memory_order_release);
  } else {
    s.occupied.fetch_sub(threads - 1, std::memory_order_relaxed);
    threads = 1;
    run_member(job, 0, 1, arg);
  }
  s.occupied.fetch_sub(threads, std::memory_order_relaxed);
}

const char* team_kind() {
  switch (kind_now()) {
    case Kind::kGomp:
      return "borrowed libgomp";
    case Kind::kCaller:
      return "caller only";
    default:
      return "own pool";
  }
}

void team_configure(const char* word) {
  Kind kind;
  if (!word || !parse(word, &kind))
    throw std::invalid_argument(std::string("team kind: expected auto, own, gomp or caller, got ") +
                                (word ? word : "a null pointer"));
  if (kind == Kind::kGomp && !gomp())
    throw std::runtime_error(
        "team kind gomp: no libgomp is loaded; import torch first, or choose auto or own");
  if (kind == Kind::kGomp && state().forked)
    throw std::runtime_error("team kind gomp: libgomp does not work after fork; choose auto or own");
  state().kind = kind;
}

}  // namespace fastrnn
