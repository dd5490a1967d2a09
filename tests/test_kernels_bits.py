"""Which results are the same to the last bit: across threads, partitions, batches and machines."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastrnn import ops
from tests.problems import (
    CELLS,
    NORMED,
    Case,
    Problem,
    Result,
    check,
    forward,
    forward_train,
    solve_ops,
)
from tests.tolerances import assert_same_bits

ROOT = Path(__file__).resolve().parent.parent
# Each value of these is one ordered chain of fused multiply-adds, whatever runs it.
ORDERED = ("y", "h_n", "c_n", "cells", "dx", "dh0", "dc0")

SHAPES = [
    {"T": 5, "N": 1, "I": 7, "H": 33},
    {"T": 4, "N": 2, "I": 16, "H": 100, "directions": 2},
    {"T": 6, "N": 5, "I": 3, "H": 17, "layout": "batch", "lengths": True, "reset": True},
    {"T": 7, "N": 23, "I": 40, "H": 64, "layout": "packed", "directions": 2},
    {"T": 3, "N": 64, "I": 9, "H": 48},
    {"T": 1, "N": 1, "I": 128, "H": 128},
    {"T": 1, "N": 40, "I": 150, "H": 48},
]
CASES = [
    *(Case(cell, **shape) for cell in CELLS for shape in SHAPES),
    *(Case(cell, torch.float64, **SHAPES[3]) for cell in CELLS),
    *(Case(cell, torch.bfloat16, **SHAPES[i]) for cell in CELLS for i in (0, 3)),
    *(Case(cell, torch.bfloat16, T=4, N=7, I=9, H=101) for cell in CELLS),
    *(Case(cell, T=6, N=9, I=5, H=40, recompute=True) for cell in CELLS),
    Case("lstm", T=5, N=1, I=7, H=50, proj=33),
    Case("lstm", T=5, N=19, I=7, H=50, proj=33, directions=2),
]


def results(case: Case) -> Result:
    p = Problem(case)
    return solve_ops(p) | {f"inference {k}": v for k, v in forward(p).items()}


def assert_equal_results(case: Case, got: Result, expected: Result, what: str) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert_same_bits(f"{name} of {case}, {what}", value, expected[name])


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on one instruction set; skipped where the machine has not got it."""
    from fastrnn import _cpu

    if request.param not in _cpu.isas():
        pytest.skip(f"this machine has no {request.param}")
    before = _cpu.isa()
    _cpu.select_isa(request.param)
    yield request.param
    _cpu.select_isa(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_thread_counts(case: Case, threads: int, set_threads: object) -> None:
    got = results(case)
    torch.set_num_threads(1)
    assert_equal_results(case, got, results(case), f"{threads} threads against 1")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_partitions(case: Case) -> None:
    rows = results(dataclasses.replace(case, plan="partition=rows"))
    units = results(dataclasses.replace(case, plan="partition=units"))
    assert_equal_results(case, rows, units, "partition=rows against units")
    assert_equal_results(case, rows, results(case), "partition=rows against the default")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeated_calls(case: Case) -> None:
    first = results(case)
    for _ in range(3):
        assert_equal_results(case, results(case), first, "a later call")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_and_inference(case: Case) -> None:
    p = Problem(case)
    inference, training = forward(p), forward_train(p)
    for name, value in inference.items():
        assert_same_bits(f"{name} of {case}, training", training[name], value)


@pytest.mark.parametrize("recompute", [False, True], ids=["tape", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
def test_recompute_changes_no_forward(cell: str, recompute: bool) -> None:
    case = Case(cell, T=5, N=9, I=6, H=40, directions=2, recompute=recompute)
    plain = solve_ops(Problem(dataclasses.replace(case, recompute=False)))
    got = solve_ops(Problem(case))
    for name in ("y", "h_n", "c_n", "cells"):
        assert_same_bits(name, got[name], plain[name])


def row_of(p: Problem, n: int) -> Problem:
    """The problem of sequence n alone: same weights, its own rows of everything else."""
    alone = Problem(dataclasses.replace(p.case, N=1, lengths=False))
    axis = 0 if p.case.layout == "batch" else 1

    def pick(t: torch.Tensor, axis: int) -> torch.Tensor:
        return t.narrow(axis, n, 1).clone()

    alone.weights, alone.x, alone.h0 = p.weights, pick(p.x, axis), pick(p.h0, 1)
    alone.c0 = None if p.c0 is None else pick(p.c0, 1)
    alone.reset = None if p.reset is None else pick(p.reset, axis)
    alone.lengths = None if p.lengths is None else pick(p.lengths, 0)
    alone.upstream = {k: pick(v, 1 if k in ("h_n", "c_n") else axis) for k, v in p.upstream.items()}
    return alone


BATCHED = [c for c in CASES if c.layout != "packed" and c.N > 1]


@pytest.mark.parametrize("case", BATCHED, ids=str)
def test_batch_invariance(case: Case) -> None:
    """A sequence gets the bits it would get alone, whoever shares its batch."""
    p = Problem(case)
    batch = results(case)
    axis = 0 if case.layout == "batch" else 1
    for n in {0, 1, case.N // 2, case.N - 1}:
        q = row_of(p, n)
        single = solve_ops(q) | {f"inference {k}": v for k, v in forward(q).items()}
        for name, value in single.items():
            key = name.removeprefix("inference ")
            if key not in ORDERED or value.numel() == 0:
                continue
            where = axis if key in ("y", "cells", "dx") else 1
            row = batch[name].narrow(where, n, 1)
            assert_same_bits(f"{name} of row {n} of {case}", value, row)


@pytest.mark.parametrize("cell", CELLS)
def test_prefetches_change_no_bit(cell: str, isa: str, set_threads: Callable[[int], None]) -> None:
    """From eight rows on, weights beyond 1 MiB are fetched ahead, by products that are their own on
    AVX2 and below: the bits are those of seven rows, which fetch nothing."""
    set_threads(1)
    hidden = {"lstm": 400, "gru": 450}.get(cell.removesuffix("_layer_norm"), 760)
    for dtype in (torch.float32, torch.bfloat16):
        p = Problem(Case(cell, dtype, T=2, N=13, I=3, H=hidden))
        got = forward(p)
        p.x, p.h0 = p.x[:, 5:12], p.h0[:, 5:12]
        p.c0 = None if p.c0 is None else p.c0[:, 5:12]
        for name, value in forward(p).items():
            if value.numel():
                assert_same_bits(f"{name} of {p.case}", got[name][:, 5:12], value)


def same_on_every_vector_isa(case: Case) -> bool:
    """AVX512_BF16's dot product rounds in its own way, and the baseline has no FMA; a layer norm's
    sums run over as many lanes as a vector has."""
    return case.dtype is not torch.bfloat16 and case.cell not in NORMED


@pytest.mark.parametrize("case", CASES, ids=str)
def test_instruction_sets(case: Case, isa: str) -> None:
    """Right on every instruction set, the same bits on all with FMA but for weight gradients."""
    from fastrnn import _cpu

    p = Problem(case)
    got = results(case)
    check(p, {k: v for k, v in got.items() if not k.startswith("inference")})
    if isa == "baseline" or not same_on_every_vector_isa(case):
        return
    _cpu.select_isa(next(name for name in _cpu.isas() if name != "avx512bf16"))
    for name, value in results(case).items():
        if name.removeprefix("inference ") in ORDERED:
            assert_same_bits(f"{name} of {case}, {isa}", got[name], value)


def test_packed_weights_of_every_isa(isa: str) -> None:
    for cell in CELLS:
        p = Problem(Case(cell, N=7, I=9, H=33, directions=2))
        packed = ops.pack_weights(p.weights, cell, "")
        check(p, forward(p, packed=packed))


_CHILD = """
import sys, torch
from fastrnn import _cpu
from tests.test_kernels_bits import CASES, results
torch.use_deterministic_algorithms(True)
print(_cpu.isa())
torch.save([results(c) for c in CASES[::5]], sys.argv[1])
"""


def run_child(isa: str, path: Path) -> tuple[str, str, list[Result]]:
    """What another process computes with FASTRNN_ISA set: its isa, its stderr, its results."""
    env = os.environ | {"FASTRNN_ISA": isa, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr, torch.load(path)


def test_isa_from_the_environment(tmp_path: Path) -> None:
    """FASTRNN_ISA selects, announces itself, and gives the bits documented as equal."""
    from fastrnn import _cpu

    names = [name for name in ("avx512", "avx2") if name in _cpu.isas()]
    runs = {name: run_child(name, tmp_path / f"{name}.pt") for name in names}
    for name, (chosen, message, _) in runs.items():
        assert chosen == name
        assert f"instruction set {name}, because FASTRNN_ISA is set" in message
    for case, *outcomes in zip(CASES[::5], *(r[2] for r in runs.values()), strict=True):
        if not same_on_every_vector_isa(case):
            continue
        for name in outcomes[0]:
            if name.removeprefix("inference ") in ORDERED:
                assert_same_bits(f"{name} of {case}", outcomes[-1][name], outcomes[0][name])


def test_unknown_isa_falls_back_and_says_so(tmp_path: Path) -> None:
    chosen, message, _ = run_child("mmx", tmp_path / "mmx.pt")
    from fastrnn import _cpu

    assert chosen == _cpu.isas()[0]
    assert "FASTRNN_ISA=mmx is unknown or not on this machine" in message
