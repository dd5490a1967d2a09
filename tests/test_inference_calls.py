"""Calls without gradients of RHN and BNLSTM whose shape was seen before: the general way's bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations

import fastrnn
from fastrnn.backends import cpu_prepared

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "RHN": [
        {},
        {"num_layers": 3, "batch_first": True},
        {"couple_carry": False, "bidirectional": True, "num_layers": 2},
        {"bias": False, "depth": 1},
        {"variational_input": 0.3, "variational_state": 0.2, "dropout": 0.1, "num_layers": 2},
    ],
    "BNLSTM": [
        {},
        {"num_layers": 3, "batch_first": True},
        {"bidirectional": True, "num_layers": 2},
        {"bias": False, "input_stats": "sequence"},
        {"max_length": 1, "h0_noise": 0.1},
        {"learn_init_state": True},
    ],
}
CASES = [(cell, options) for cell, each in OPTIONS.items() for options in each]
SHAPES: list[tuple[int, ...]] = [(4, 3, 5), (4, 5), (1, 1, 5), (9, 1, 5)]


def make(cell: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"max_length": 6, **options} if cell == "BNLSTM" else {"depth": 3, **options}
    module = getattr(fastrnn, cell)(5, 7, dtype=dtype, **options)
    if cell == "BNLSTM":
        for batch in torch.randn(3, 8, 6, 5, dtype=dtype):
            module(batch)
    return module.eval()


def leaves(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state[:2])


def states(module: Any, batch: int | None) -> Any:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    dtype = next(module.parameters()).dtype
    shape = (layers, 7) if batch is None else (layers, batch, 7)
    h = torch.randn(shape, dtype=dtype)
    return (h, torch.randn(shape, dtype=dtype)) if isinstance(module, fastrnn.BNLSTM) else h


def general(module: Any, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """The same call by a copy that has prepared nothing."""
    return copy.deepcopy(module)(x, hx)


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip((got[0], *leaves(got[1])), (expected[0], *leaves(expected[1])), strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("exchange", [cpu_prepared.EXCHANGE, None], ids=["dlpack", "attributes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["default", "hx"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell, options", CASES, ids=str)
@torch.no_grad()
def test_sequences(
    cell: str,
    options: dict[str, Any],
    shape: tuple[int, ...],
    given: bool,
    dtype: torch.dtype,
    exchange: Any,
) -> None:
    cpu_prepared.setup_torch(exchange)
    try:
        module = make(cell, dtype, **options)
        x = torch.randn(shape, dtype=dtype)
        size = None if x.dim() == 2 else x.size(0 if module.batch_first else 1)
        hx = states(module, size) if given else None
        expected = general(module, x, hx)
        for turn in range(4):
            assert_same(module(x, hx), expected)
            default = options.get("learn_init_state", False) and not given
            assert (module._packed.sequence is not None) == (turn > 0 and not default)
    finally:
        cpu_prepared.setup_torch()


@pytest.mark.parametrize("unbatched", [False, True], ids=["batch", "unbatched"])
@pytest.mark.parametrize(
    "cell, options", [case for case in CASES if not case[1].get("bidirectional")], ids=str
)
@torch.no_grad()
def test_steps_are_the_sequence_with_statistics_of_their_own_numbers(
    cell: str, options: dict[str, Any], unbatched: bool
) -> None:
    module = make(cell, **options)
    x = torch.randn(9, 5) if unbatched else torch.randn(9, 3, 5)
    whole = x.transpose(0, 1) if module.batch_first and not unbatched else x
    expected = general(module, whole)
    outputs, state = [], None
    for x_t in x:
        y_t, state = module.step(x_t, state)
        outputs.append(y_t)
    assert module._packed.stepper is not None
    time_dim = 1 if module.batch_first and not unbatched else 0
    got = torch.stack(outputs, time_dim)
    # One step and a whole sequence are cut differently; each output is one chain of products.
    torch.testing.assert_close(got, expected[0])
    for a, b in zip(leaves(state), leaves(expected[1]), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)


CHANGES = ["matrix", "vector", "word", "replaced", "loaded"]


@pytest.mark.parametrize(
    "cell, what", [(cell, what) for cell in OPTIONS for what in CHANGES] + [("BNLSTM", "statistic")]
)
@torch.no_grad()
def test_changed_weights_and_statistics_are_noticed(cell: str, what: str) -> None:
    module, other = make(cell), make(cell)
    for parameter in other.parameters():
        parameter.mul_(0.5)
    x = torch.randn(4, 3, 5)
    for _ in range(3):
        before = module(x)[0]
        module.step(x[0])
    assert module._packed.sequence is not None
    names = {"matrix": "weight_hh_l0", "vector": "bias_l0"}
    name = names.get(what, "weight_ih_l0")
    if what in names:
        getattr(module, name).mul_(-1)
    elif what == "statistic":
        module.running_mean_hh_l0.add_(1)
    elif what == "word":
        getattr(module, name).data.add_(1)
    elif what == "replaced":
        setattr(module, name, nn.Parameter(getattr(module, name) * 2))
    else:
        module.load_state_dict(other.state_dict())
    expected = general(module, x)
    assert not torch.equal(expected[0], before)
    assert_same(module(x), expected)
    assert_same(module.step(x[0]), copy.deepcopy(module).step(x[0]))


@pytest.mark.parametrize("wrong", ["shape", "dtype"])
@pytest.mark.parametrize("cell", OPTIONS)
@torch.no_grad()
def test_tensors_that_no_longer_fit_are_refused(cell: str, wrong: str) -> None:
    """The library would read past the end of those."""
    module, x = make(cell), torch.randn(4, 3, 5)
    for _ in range(3):
        expected = module(x)
        module.step(x[0])
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point() or (wrong == "dtype" and name.startswith("running")):
            continue  # counts are not read, and statistics are converted
        value = tensor.double() if wrong == "dtype" else tensor[..., :2].clone()
        setattr(module, name, nn.Parameter(value) if name in module._parameters else value)
        for _ in range(2):
            for call in (lambda: module(x), lambda: module.step(x[0])):
                with pytest.raises((RuntimeError, ValueError)):
                    call()
        setattr(module, name, tensor)
        assert_same(module(x), expected)


@pytest.mark.parametrize("cell", OPTIONS)
def test_training_between_calls(cell: str) -> None:
    """A fused optimiser moves no version counter; statistics follow each batch."""
    module, x = make(cell), torch.randn(4, 3, 5)
    optimiser = torch.optim.Adam(module.parameters(), 0.1, fused=True)
    for _ in range(3):
        with torch.no_grad():
            for _ in range(3):
                assert_same(module(x), general(module, x))
                assert_same(module.step(x[0]), copy.deepcopy(module).step(x[0]))
        module.train()
        with torch.no_grad():
            torch.manual_seed(1)
            got = module(x)[0]
        assert (cell == "RHN") == torch.equal(got, module.eval()(x)[0].detach())
        module.train()
        module(x)[0].square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        module.eval()


@pytest.mark.parametrize("cell", OPTIONS)
@torch.no_grad()
def test_settings_changed_after_a_call_was_prepared(cell: str) -> None:
    changes: dict[str, list[tuple[str, Any]]] = {
        "RHN": [("batch_first", True), ("variational_state", 0.5)],
        "BNLSTM": [("batch_first", True), ("eps", 0.1), ("momentum", None)],
    }
    x = torch.randn(4, 4, 5)
    for name, value in changes[cell]:
        module = make(cell)
        for _ in range(3):
            module(x)
        setattr(module, name, value)
        assert_same(module(x), general(module, x))
    module = make("RHN", variational_input=0.5)
    for _ in range(3):
        module(x)
    assert not torch.equal(module.train()(x)[0], module.eval()(x)[0])


@pytest.mark.parametrize("cell", OPTIONS)
@torch.no_grad()
def test_what_another_way_serves_and_says(cell: str) -> None:
    module, x = make(cell), torch.randn(4, 3, 5)
    for _ in range(3):
        expected = module(x)
        module.step(x[0])
    with pytest.raises(RuntimeError, match="input_size"):
        module(torch.randn(4, 3, 6))
    with pytest.raises(ValueError, match="dtype"):
        module(x.double())
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        module.step(x[0], "state")
    assert_same(module(x, lengths=[4, 4, 4]), expected)
    with fastrnn.use_backend("reference"):
        torch.testing.assert_close(module(x)[0], expected[0])
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
    graph = make_fx(lambda x: module(x)[0])(x)
    assert f"{cell.lower()}_forward" in graph.code
    with torch.profiler.profile() as seen:
        module(x)
    assert f"fastrnn::{cell.lower()}_forward" in {event.key for event in seen.key_averages()}
    with torch.inference_mode():
        assert module(x)[0].is_inference()
    assert_same(module(x), expected)
    assert module.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_l0", "bn_weight_c_l0"])
@torch.no_grad()
def test_parametrised_weights_take_the_general_way(name: str) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    for cell in OPTIONS:
        module, x = make(cell), torch.randn(4, 3, 5)
        if not hasattr(module, name):
            continue
        for _ in range(3):
            module(x)
        doubled = copy.deepcopy(module)
        getattr(doubled, name).mul_(2)
        nn.utils.parametrize.register_parametrization(module, name, Doubled(), unsafe=True)
        for _ in range(3):
            assert_same(module(x), doubled(x))
            assert_same(module.step(x[0]), doubled.step(x[0]))
    module = parametrizations.weight_norm(make("BNLSTM"), "weight_hh_l0")
    for _ in range(3):
        assert_same(module(x), general(module, x))
