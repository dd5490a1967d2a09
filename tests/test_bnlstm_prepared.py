"""Training steps of a BNLSTM that go straight to the CPU library: what the general way gives."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn.backends import cpu
from fastrnn.nn import bnlstm_call

pytestmark = pytest.mark.skipif(not cpu.LOADED, reason="the native library is not built")
T, N, I, H = 7, 5, 6, 19
FUNCTIONAL = sys.modules["fastrnn.functional.bnlstm"]  # which the function of that name hides


def make(**options: Any) -> fastrnn.BNLSTM:
    torch.manual_seed(1)
    return fastrnn.BNLSTM(I, H, **{"max_length": 5, **options})


def given(module: fastrnn.BNLSTM, dtype: torch.dtype = torch.float32, states: bool = False) -> Any:
    shape = (N, T, I) if module.batch_first else (T, N, I)
    generator = torch.Generator().manual_seed(2)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype).requires_grad_()

    directions = 2 if module.bidirectional else 1
    hx = (normal(directions, N, H), normal(directions, N, H)) if states else None
    return normal(*shape), hx


def step(module: fastrnn.BNLSTM, x: Tensor, hx: Any) -> list[Tensor]:
    y, (h, c) = module(x, hx)
    wanted = [x, *(hx or ()), *module.parameters()]
    found = torch.autograd.grad(y.square().sum() + h.sum() + (c * c).sum(), wanted)
    return [y.detach(), h.detach(), c.detach(), *found]


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the prepared calls return, as they are made."""
    made: list[Any] = []
    real = bnlstm_call.TrainingCall.__call__

    def noted(*args: Any) -> Any:
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(bnlstm_call.TrainingCall, "__call__", noted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True, "batch_first": True},
        {"bias": False, "input_stats": "sequence", "momentum": 0.6},
        {"max_length": 1, "eps": 1e-3},
        {"max_length": 30, "momentum": 1.0},
    ],
    ids=str,
)
def test_like_the_general_way(
    options: dict[str, Any], states: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, general = make(**options).to(dtype), make(**options).to(dtype)
    general.h0_noise = 0.1 if states else 0.0  # acts without a state only
    x, hx = given(ours, dtype, states)
    made = calls_of(monkeypatch)
    for _ in range(3):
        found = step(ours, x, hx)
        with monkeypatch.context() as patch:
            patch.setattr(fastrnn.BNLSTM, "_natively_recorded", lambda *args: None)
            patch.setattr(FUNCTIONAL, "_followed", lambda *args: False)
            expected = step(general, x, hx)
        for t, e in zip(found, expected, strict=True):
            assert torch.equal(t, e)
        for (name, t), (_, e) in zip(ours.named_buffers(), general.named_buffers(), strict=True):
            assert torch.equal(t, e), name
    assert len(made) == 2
    assert None not in made


def test_what_changes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make()
    x, hx = given(module)
    for _ in range(3):
        step(module, x, hx)
    made = calls_of(monkeypatch)

    def general() -> list[Tensor]:
        other = copy.deepcopy(module)
        with monkeypatch.context() as patch:
            patch.setattr(fastrnn.BNLSTM, "_natively_recorded", lambda *args: None)
            found = step(other, x, hx)
        return [*found, *other.buffers()]

    def change(name: str, value: Any) -> None:
        setattr(module, name, value)
        expected = general()
        found = step(module, x, hx)
        for t, e in zip([*found, *module.buffers()], expected, strict=True):
            assert torch.equal(t, e), name

    change("momentum", 0.3)
    change("eps", 0.1)
    change("eps", 1e-5)
    change("weight_hh_l0", torch.nn.Parameter(module.weight_hh_l0 * 2))
    change("momentum", None)
    change("momentum", 0.1)
    change("running_mean_c_l0", module.running_mean_c_l0.clone())
    change("training", False)
    change("training", True)
    assert sum(call is not None for call in made) >= 6
    module.weight_hh_l0 = torch.nn.Parameter(torch.zeros(4 * H, H + 1))
    with pytest.raises(RuntimeError, match="flat_weights"):
        step(module, x, hx)


def test_versions_move() -> None:
    """Autograd sees that the statistics were written to."""
    module = make()
    x, hx = given(module)
    step(module, x, hx)
    before = [buffer._version for buffer in module.buffers()]
    step(module, x, hx)
    assert all(b._version > v for b, v in zip(module.buffers(), before, strict=True))
    scale = torch.ones((), requires_grad=True)
    product = (scale * module.running_mean_hh_l0).sum()
    step(module, x, hx)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize(
    "options", [{"num_layers": 2}, {"momentum": None}, {"h0_noise": 0.1}], ids=str
)
def test_not_for(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls_of(monkeypatch)
    module = make(**options)
    x, hx = given(module)
    for _ in range(3):
        step(module, x, hx)
    one = x.detach()[:, :1].clone().requires_grad_()
    alone = make()
    for _ in range(3):
        alone(one)
        alone(x, lengths=[T] * N)
        with torch.no_grad():
            alone(x)
    assert made == []


def test_twice_differentiable() -> None:
    module = make().double()
    x, _ = given(module, torch.float64)
    for _ in range(2):
        step(module, x, None)
    (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    with fastrnn.use_backend("reference"):
        (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(second, expected, rtol=1e-9, atol=1e-10)
