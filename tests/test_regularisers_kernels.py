"""The ops with recurrent dropout and zoneout against the float64 reference with the same masks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from fastrnn.noise import Noise
from tests.problems import CELLS, Case, Problem, solve_ops
from tests.test_kernels import DTYPES, LAYOUTS, drawn_sizes, verify
from tests.tolerances import assert_same_bits

MODES = {"lstm": ("update", "cell", "state"), "gru": ("update", "state"), "rnn": ("state",)}


def noises(cell: str) -> dict[str, Noise]:
    """Every mode, per step and per sequence, zoneout alone and beside it, in training and not."""
    kind = cell.split("_")[0]
    zone_c = 0.5 if kind == "lstm" else 0.0
    made = {
        "zoneout": Noise(0, True, zoneout_h=0.3, zoneout_c=zone_c),
        "zoneout-eval": Noise(0, False, zoneout_h=0.3, zoneout_c=zone_c),
    }
    if kind == "lstm":
        made["zoneout_h"] = Noise(2, True, zoneout_h=0.3)
        made["zoneout_c"] = Noise(2, True, zoneout_c=0.3)
        made["zoneout_c-eval"] = Noise(2, False, zoneout_c=0.3)
    for mode, sequence in itertools.product(MODES[kind], (False, True)):
        name = mode + ("-sequence" if sequence else "")
        made[name] = Noise(1, True, mode, sequence, 0.4)
        made[name + "-zoneout"] = Noise(1, True, mode, sequence, 0.4, 0.2, zone_c)
        if not sequence:
            made[name + "-eval"] = Noise(1, False, mode, sequence, 0.4)
            made[name + "-zoneout-eval"] = Noise(1, False, mode, sequence, 0.4, 0.2, zone_c)
    return made


def grid() -> list[Case]:
    """Every cell x noise x layout; all else drawn, from a fixed seed, per point."""
    choose = random.Random(2016)
    cases = []
    for cell in CELLS:
        for noise, layout in itertools.product(noises(cell).values(), LAYOUTS.values()):
            name, lengths, reset = layout
            # In bfloat16 rounding would decide branches that y does not show there.
            few = cell == "rnn_relu" and noise.mixes
            case = Case(
                cell,
                choose.choice(DTYPES[:2] if few else DTYPES),
                **drawn_sizes(choose, cell),
                directions=choose.choice((1, 2)),
                layout=name,
                lengths=lengths,
                reset=reset,
                bias=choose.random() < 0.7,
                recompute=choose.random() < 0.4,
                plan=choose.choice(("", "partition=rows", "partition=units")),
                seed=len(cases),
                noise=noise,
            )
            cases.append(case)
    return cases


@pytest.mark.parametrize("case", grid(), ids=str)
def test_layer(case: Case) -> None:
    verify(Problem(case))


@pytest.mark.parametrize("sequence", [False, True], ids=["step", "sequence"])
@pytest.mark.parametrize("cell", CELLS)
def test_one_step_on_threads(cell: str, sequence: bool, set_threads: Callable[[int], None]) -> None:
    """Threads divide the columns of one step's gradients where no vector's mask bits are divided,
    and each draws those of all rows."""
    noise = Noise(1, True, "state", sequence, 0.4, 0.2)
    p = Problem(Case(cell, T=1, N=10, I=40, H=250, noise=noise))
    set_threads(1)
    expected = solve_ops(p)
    for threads in (2, 3):
        set_threads(threads)
        for name, value in solve_ops(p).items():
            assert_same_bits(f"{name} of {p.case}, {threads} threads", value, expected[name])
