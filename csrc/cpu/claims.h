// Who computes what of a stage that threads divide. Each has pieces of its own and, when it is through with them, takes over what others
// have not begun: a core that is slower for a while, because its other half or its clock is somebody else's, is then waited
// for as long as one piece takes, and not at every barrier. Nothing that is computed depends on who computes it.
#pragma once
#include <atomic>
#include <new>

#include "sequence.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// A thread's pieces of one stage: how many of the open ones are taken, by itself from the front and by others from the back.
struct alignas(64) Claim {
  std::atomic<int32_t> taken{0}, given{0};
};

// Rows of dx in a piece. With 32 registers fewer were not measured.
constexpr int64_t kInputRows = (kRegisters == 16 ? 8 : 16) * kMaxRows;

// One thread's view of the claims of its group, whose room is common. Two sets of claims take turns: a thread clears its own of the
// next stage before the barrier that ends this one.
class Division {
 public:
  static Claim* room(Arena& arena, int threads) { return arena.take<Claim>(2 * threads); }

  // Before a barrier of the group that comes before its first stage.
  void begin(Claim* common, const Share& share, const Problem& p) {
    room_ = common;
    id = share.id;
    count = share.count;
    stage_ = 0;
    scattered_ = p.scattered;
    for (int set = 0; set < 2; set++) new (&at(set, id)) Claim;
  }

  // Calls f(thread, piece) for this thread's own pieces, in order, and where they are `shared` for those that it takes over, from
  // the last on; pieces(thread): how many a thread has. The group meets after a shared stage.
  template <class P, class F>
  void run(bool shared, P&& pieces, F&& f) {
    const int32_t own = static_cast<int32_t>(pieces(id));
    shared = shared && count > 1;
    const int set = stage_ % 2;
    if (shared) {
      stage_++;
      new (&at(1 - set, id)) Claim;
    }
    // The first half of its pieces stays a thread's own and needs no claim.
    const auto sure = [&](int32_t all) { return !shared ? all : scattered_ ? 0 : all / 2; };
    int32_t mine = 0;
    int k = scattered_, last = shared ? k + count : k;
    const auto take = [&](int& of, int64_t& piece) {
      of = id;
      piece = mine;
      if (mine < sure(own)) return ++mine, true;
      for (; k < last; k++) {
        of = (id + k) % count;
        const int32_t all = of == id ? own : static_cast<int32_t>(pieces(of));
        Claim& claims = at(set, of);
        if (!claim(claims, all - sure(all))) continue;
        piece = of == id ? mine++ : all - 1 - claims.given.fetch_add(1, std::memory_order_relaxed);
        return true;
      }
      return false;
    };
    int of;
    for (int64_t piece; take(of, piece);) f(of, piece);  // the one place that calls it: what it does is large
  }

  // Thread `of`'s blocks of a matrix that the group divides, or all of them where it is not `split`.
  template <class E>
  PanelRuns runs(const Panels<E>& p, bool split, int of, bool back = false, int64_t rows = kMaxRows) const {
    return PanelRuns(p, split ? p.blocks * of / count : 0, split ? p.blocks * (of + 1) / count : p.blocks,
                     back, rows);
  }
  template <class E>
  PanelRuns own(const Panels<E>& p, bool split) const {
    return runs(p, split, id);
  }

  struct Walk {
    bool split, shared;   // whether threads divide the blocks, and take over from one another
    bool back = false;    // from each thread's last block on
    bool singly = false;  // never several blocks at once
  };
  // run() of the blocks of a matrix of K rows, as `rows` rows meet them: f(block, how many from it on, the block that this thread
  // would come to next, or -1).
  template <class E, class F>
  void panels(const Panels<E>& p, int64_t K, int64_t rows, const Walk& walk, F&& f) {
    const auto all = [&](int of) {
      return runs(p, walk.split, of, walk.back, walk.singly ? kMaxRows : rows);
    };
    const PanelRuns mine = all(id);
    const bool shared = walk.shared && p.blocks && worth_claiming(rows * K * p.columns(0) * mine.most);
    run(
        shared, [&](int of) { return of == id ? mine.count() : all(of).count(); },
        [&](int of, int64_t i) {
          const PanelRuns theirs = of == id ? mine : all(of);
          theirs.at(i, [&](int64_t b, int n) {
            const int64_t next = walk.back == (of == id) ? b - 1 : b + n;
            f(b, n, next >= theirs.b0 && next < theirs.b1 ? next : -1);
          });
        });
  }

  // Whether a piece of so many multiplications takes much longer than a line between two caches, which a claim may wait for.
  bool worth_claiming(int64_t products) const { return scattered_ || products >= 1 << 15; }

  int id = 0, count = 1;  // this thread's place in its group

 private:
  Claim& at(int set, int thread) const { return room_[set * count + thread]; }
  // Read first: what is all taken stays in the caches of all.
  static bool claim(Claim& c, int32_t open) {
    return c.taken.load(std::memory_order_relaxed) < open &&
           c.taken.fetch_add(1, std::memory_order_relaxed) < open;
  }

  Claim* room_ = nullptr;
  int64_t stage_ = 0;
  bool scattered_ = false;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
