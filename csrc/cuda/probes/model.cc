// plan.h's cost model as a filter, for whoever fits its constants: host code, no CUDA. One request a line, one answer a line.
//   set INDEX VALUE                  a constant of CostModel, by its place in the header; answers "ok"
//   device SMS SHARED REGISTERS CC CLUSTERS
//   step CELL FORMAT BACKWARD N H DIRECTIONS DEPTH EXCHANGE UNITS ROW_TILES CHUNKS RESIDENT WARPS TEAMS GROUPS CTAS LAUNCHES
//                                    microseconds of a step
//   best CELL FORMAT BACKWARD N H DIRECTIONS DEPTH     the persistent plan by the constants of cost_model.h: fields of `step`, microseconds
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <type_traits>

#include "../plan.h"

using namespace fastrnn::cuda;

// All of CostModel's members are doubles, in the header's order.
static double* constant(CostModel& m, size_t index) {
  static_assert(sizeof(CostModel) % sizeof(double) == 0 && std::is_trivially_copyable_v<CostModel>);
  return index < sizeof(CostModel) / sizeof(double) ? reinterpret_cast<double*>(&m) + index : nullptr;
}

static bool read_problem(std::istream& in, PlanProblem& q) {
  int cell = 0, format = 0, backward = 0;
  in >> cell >> format >> backward >> q.N >> q.H >> q.directions >> q.depth;
  q.cell = static_cast<CellKind>(cell), q.format = static_cast<Format>(format), q.backward = backward != 0;
  return !in.fail();
}

static bool read_plan(std::istream& in, Plan& p) {
  int exchange = 0;
  in >> exchange >> p.tile.units >> p.tile.row_tiles >> p.tile.chunks >> p.tile.resident >> p.tile.warps;
  in >> p.tile.teams >> p.groups >> p.ctas >> p.launches;
  p.exchange = static_cast<ExchangeKind>(exchange);
  return !in.fail();
}

int main() {
  Device device;
  CostModel model;
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    std::string what;
    PlanProblem q;
    Plan p;
    in >> what;
    if (what == "set") {
      size_t index = 0;
      double value = 0, *to = (in >> index >> value) ? constant(model, index) : nullptr;
      if (to) *to = value;
      std::puts(to ? "ok" : "no such constant");
    } else if (what == "device") {
      in >> device.sms >> device.shared_bytes >> device.registers >> device.compute_capability >>
          device.most_clusters;
      std::puts(in.fail() ? "five numbers expected" : "ok");
    } else if (what == "step" && read_problem(in, q) && read_plan(in, p)) {
      std::printf("%.9g\n", p.launches * step_time(q, p, device, model));
    } else if (what == "best" && read_problem(in, q)) {
      Plan best;
      best.refused = "none";
      for (const Plan& one : candidates(q, device))  // layers step by step have a model of their own
        if (one.exchange != ExchangeKind::steps && !best.possible()) best = one;
      if (!best.possible())
        std::puts("none");
      else
        std::printf("%d %d %d %d %d %d %d %d %d %d %.9g\n", static_cast<int>(best.exchange), best.tile.units,
                    best.tile.row_tiles, best.tile.chunks, best.tile.resident, best.tile.warps,
                    best.tile.teams, best.groups, best.ctas, best.launches, best.step_us);
    } else {
      std::puts("not understood");
    }
    std::fflush(stdout);
  }
  return 0;
}
