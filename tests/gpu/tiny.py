"""What compute-sanitizer watches: every cell and exchange once, on grids of a few CTAs."""

from __future__ import annotations

import torch

from tests.bnlstm_problems import BNCase, BNProblem, solve_ops
from tests.gpu.on_gpu import moved, settle, solve
from tests.gpu.test_gpu_bnlstm import on_device
from tests.problems import PLAIN, Case, Problem


def main() -> None:
    for cell in PLAIN:
        for hidden, exchange in ((24, "local"), (40, "cluster"), (40, "sentinel"), (37, "flags")):
            if exchange == "flags" and cell != "lstm":
                continue
            case = Case(
                cell, torch.bfloat16, T=3, N=9, H=hidden, directions=2, lengths=True,
                plan=f"cuda,{exchange}",
            )  # fmt: skip
            solve(moved(Problem(case)))
            settle()
    for plan in ("cuda,sentinel", "cuda,steps"):
        bn = BNCase(torch.bfloat16, T=3, N=70, H=20, directions=2, lengths=True, plan=plan)
        solve_ops(on_device(BNProblem(bn)))
        settle()
    print("all done")


if __name__ == "__main__":
    main()
