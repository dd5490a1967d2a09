"""Inference calls of a shape seen before: prepared once, with the bits of the general way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastrnn

CELLS = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}


def make(cell: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return CELLS[cell](5, 7, **options).eval()


def parts(results: Any) -> list[torch.Tensor]:
    output, state = results
    return [output, *(state if isinstance(state, tuple) else (state,))]


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(parts(got), parts(expected), strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def states(module: Any, batch: int | None) -> Any:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    middle = () if batch is None else (batch,)
    h = torch.randn(layers, *middle, module.proj_size or 7)
    return (h, torch.randn(layers, *middle, 7)) if module.mode == "LSTM" else h


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize(
    "shape, batch_first",
    [((4, 3, 5), False), ((4, 3, 5), True), ((4, 5), False), ((1, 1, 5), True)],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 3},
        {"bidirectional": True, "num_layers": 2},
        {"bias": False},
        {"bias": False, "bidirectional": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_the_bits_of_the_general_way(
    cell: str, options: dict[str, Any], shape: tuple[int, ...], batch_first: bool, given: bool
) -> None:
    module = make(cell, batch_first=batch_first, **options)
    x = torch.randn(shape)
    hx = None
    if given:
        hx = states(module, None if x.dim() == 2 else shape[0 if batch_first else 1])
    expected = module(x, hx)  # gradients are recorded: never prepared
    with torch.no_grad():
        for turn in range(3):
            assert_same(module(x, hx), expected)
            assert (module._packed.sequence is not None) == (turn > 0)


def test_projection() -> None:
    module = make("lstm", proj_size=3, num_layers=2)
    x = torch.randn(4, 2, 5)
    hx = states(module, 2)
    expected = module(x, hx)
    with torch.no_grad():
        for _ in range(3):
            assert_same(module(x, hx), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_outputs_are_new_in_each_call(cell: str) -> None:
    module = make(cell, num_layers=2, bidirectional=True)
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        results = [parts(module(x)) for _ in range(4)]
    addresses = [part.data_ptr() for result in results for part in result]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("cell", CELLS)
def test_changed_weights_threads_and_shapes_are_noticed(cell: str) -> None:
    module = make(cell)
    x, longer = torch.randn(4, 2, 5), torch.randn(6, 2, 5)
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            for _ in range(2):
                before = module(x)[0]
            module.weight_hh_l0.mul_(2)
            changed = module(x)[0]
            assert not torch.equal(changed, before)
            module.weight_hh_l0 = torch.nn.Parameter(module.weight_hh_l0 / 2)
            assert torch.equal(module(x)[0], before)
            torch.set_num_threads(1)
            assert torch.equal(module(x)[0], before)
            assert module(longer)[0].shape == (6, 2, 7)
            assert module(longer)[0].shape == (6, 2, 7)
            assert torch.equal(module(x)[0], before)
    finally:
        torch.set_num_threads(threads)


def test_what_does_not_fit_is_said_as_always() -> None:
    module = make("lstm")
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        for _ in range(2):
            module(x)
        with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
            module(x, (torch.zeros(1, 3, 7), torch.zeros(1, 3, 7)))
        with pytest.raises(RuntimeError, match="input_size"):
            module(torch.randn(4, 2, 6))
        with pytest.raises(ValueError, match="dtype"):
            module(x.double())
        module.weight_ih_l0 = torch.nn.Parameter(torch.randn(28, 6))
        with pytest.raises(RuntimeError, match="input_size"):
            module(x)


def test_a_default_device_does_not_move_the_workspace() -> None:
    module = make("gru")
    x = torch.randn(4, 2, 5, requires_grad=True)
    expected = module(x)[0].detach()
    with torch.device("meta"):
        module(x)[0].sum().backward()
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(module(x)[0], expected)


def test_options_and_overrides_take_the_general_way() -> None:
    module = make("lstm")
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        for _ in range(2):
            expected = module(x)[0]
        assert torch.equal(module(x, lengths=[4, 4])[0], expected)
        assert len(module(x, return_cells=True)) == 3
        with fastrnn.use_backend("reference"):
            assert torch.allclose(module(x)[0], expected, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x)[0].dtype == torch.bfloat16
        assert torch.equal(module(x)[0], expected)
