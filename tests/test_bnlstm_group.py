"""Statistics over a process group: two processes are one process with the whole batch."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing

import fastrnn
from tests.tolerances import assert_close_by_rule

N, I, H = 5, 3, 4
LIMIT = timedelta(seconds=120)  # a rank that waits for one that failed
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"lengths": [2, 4, 1, 3, 6]},
    "sequence": {"lengths": [2, 4, 1, 3, 6], "input_stats": "sequence", "momentum": None},
    "reset": {"reset": torch.rand(6, N, generator=torch.Generator().manual_seed(1)) < 0.3},
    "single_rows": {"rows": (1, 1)},
    # The first rank's own sequences end earlier: it has to take part in all steps none the less.
    "shorter_rank": {"lengths": [2, 4, 1, 3, 6], "steps": (4, 6)},
}


def build(case: str) -> tuple[fastrnn.BNLSTM, Tensor, Tensor, tuple[int, int], dict[str, Any]]:
    torch.manual_seed(7)
    options = dict(CASES[case])
    call = {k: options.pop(k) for k in ("lengths", "reset") if k in options}
    rows, steps = options.pop("rows", (2, 3)), options.pop("steps", None)
    module = fastrnn.BNLSTM(
        I, H, 2, bidirectional=True, max_length=4, eps=0.1, gamma_init=0.5, dtype=torch.float64,
        **options,
    )  # fmt: skip
    x, upstream = torch.randn(6, sum(rows), I).double(), torch.randn(6, sum(rows), 2 * H).double()
    return module, x, upstream, rows, {**call, "steps": steps}


def run(module: fastrnn.BNLSTM, x: Tensor, upstream: Tensor, **call: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output, (h, c) = module(x, **call)
    ((output * upstream).sum() + h.sum() + c.square().sum()).backward()
    assert x.grad is not None
    return [output.detach(), h.detach(), c.detach(), x.grad]


def work(rank: int, folder: str, case: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=LIMIT
    )
    module, x, upstream, rows, call = build(case)
    module.process_group = torch.distributed.group.WORLD
    first = sum(rows[:rank])
    mine = slice(first, first + rows[rank])
    steps = call.pop("steps")
    end = x.size(0) if steps is None else steps[rank]
    own = {k: v[:end, mine] if k == "reset" else v[mine] for k, v in call.items()}
    results = run(module, x[:end, mine], upstream[:end, mine], **own)
    plan = fastrnn.explain(module, x)
    torch.save(
        {
            "results": results,
            "grads": [p.grad for p in module.parameters()],
            "buffers": dict(module.named_buffers()),
            "explain": (plan.backend, plan.plan, plan.rejected),
            "eval": module.eval()(x)[0].detach(),
            "eval_backend": fastrnn.explain(module, x).backend,
        },
        f"{folder}/{rank}.pt",
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case: str, tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path), case), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    module, x, upstream, _, call = build(case)
    call.pop("steps")
    untouched = copy.deepcopy(module)
    expected = run(module, x, upstream, **call)
    for i, name in enumerate(("y", "h", "c", "dx")):
        pieces = [p["results"][i] for p in parts]
        missing = 6 - pieces[0].size(0) if name in ("y", "dx") else 0
        if missing:
            pieces[0] = torch.cat([pieces[0], pieces[0].new_zeros(missing, *pieces[0].shape[1:])])
        assert_close_by_rule(name, torch.cat(pieces, 1), expected[i], expected[i])
    grads = zip(*(p["grads"] for p in parts), strict=True)
    for (name, parameter), (a, b) in zip(module.named_parameters(), grads, strict=True):
        assert parameter.grad is not None
        assert_close_by_rule(name, a + b, parameter.grad, parameter.grad)
    for name, buffer in module.named_buffers():
        for part in parts:
            got = part["buffers"][name]
            if not buffer.is_floating_point():
                assert torch.equal(got, buffer), name
            else:
                assert_close_by_rule(name, got, buffer, buffer)
    assert any(
        not torch.equal(a, b) for a, b in zip(module.buffers(), untouched.buffers(), strict=True)
    )
    y = module.eval()(x)[0].detach()
    for part in parts:
        assert_close_by_rule("eval", part["eval"], y, y)
        backend, plan, rejected = part["explain"]
        assert backend == "reference"
        assert "all-reduced statistics" in plan
        assert "process group" in dict(rejected)["cpu"]
        assert part["eval_backend"] == "cpu"
