"""A problem's reference is solved again when, and only when, its tensors are others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tests import bnlstm_problems, problems, rhn_problems

CHANGES: dict[str, Callable] = {
    "a write": lambda p: p.x.mul_(2),
    "another tensor": lambda p: setattr(p, "h0", p.h0 + 1),
    "another weight": lambda p: p.weights.__setitem__(1, p.weights[1] * 2),
    "upstream gradients": lambda p: p.upstream.update(y=p.upstream["y"] * 2),
    "nothing": lambda p: None,
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("of", ["layer", "bnlstm", "rhn"])
def test_what_counts_as_a_change(of: str, how: str) -> None:
    make, solve = {
        "layer": (lambda: problems.Problem(problems.Case("lstm")), problems.solve_reference),
        "bnlstm": (
            lambda: bnlstm_problems.BNProblem(bnlstm_problems.BNCase()),
            bnlstm_problems.solve_reference,
        ),
        "rhn": (lambda: rhn_problems.Problem(rhn_problems.Case()), rhn_problems.solve_reference),
    }[of]
    p, fresh = make(), make()
    before = solve(p, torch.float64)
    assert all(value is before[name] for name, value in solve(p, torch.float64).items())
    assert solve(p, torch.float32)["y"].dtype == torch.float32
    CHANGES[how](p)
    CHANGES[how](fresh)
    expected = solve(fresh, torch.float64)
    got = solve(p, torch.float64)
    assert all(torch.equal(value, expected[name]) for name, value in got.items())
    assert (got["dx"] is before["dx"]) == (how == "nothing")


def test_lengths_and_padding() -> None:
    p = problems.Problem(problems.Case("gru", lengths=True))
    before = problems.solve_reference(p, torch.float64)
    p.lengths = torch.ones_like(p.lengths)
    assert not torch.equal(problems.solve_reference(p, torch.float64)["y"], before["y"])


def test_branches_and_moved_inputs_are_not_mixed_up() -> None:
    p = problems.Problem(dataclasses.replace(problems.Case("rnn_relu"), seed=3))
    plain = problems.solve_reference(p, torch.float32)
    moved = problems.solve_reference(p, torch.float32, moved=1)
    followed = problems.solve_reference(p, torch.float32, relu_as_in=-plain["y"])
    assert not torch.equal(plain["dx"], moved["dx"])
    assert not torch.equal(plain["dx"], followed["dx"])
    assert torch.equal(plain["dx"], problems.solve_reference(p, torch.float32)["dx"])
