"""The library's descriptions of prepared calls: which call each serves, and what it refuses."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrnn
from fastrnn.backends import cpu_prepared
from tests.prepared_modules import CELLS, make, states


def test_calls_prepared_for_different_numbers_of_threads(set_threads: Any) -> None:
    module = fastrnn.GRU(32, 64).eval()
    x = torch.randn(16, 16, 32)
    found, results = [], []
    with torch.no_grad():
        for count in (1, 2):
            set_threads(count)
            for _ in range(3):
                results.append(module(x)[0])
            found.append(module._packed.sequence._inference)
        infer, rest = cpu_prepared.library().infer, (x, None, None, module._weights(), 0)
        # A description made for one number of threads serves no other.
        assert infer(found[0], *rest) is None
        results.append(infer(found[1], *rest)[0])
        set_threads(1)
        assert infer(found[1], *rest) is None
        results.append(infer(found[0], *rest)[0])
    assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("exchange", [cpu_prepared.EXCHANGE, None], ids=["dlpack", "attributes"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_description_serves_the_call_described_and_no_other(cell: str, exchange: Any) -> None:
    """What a view of a tensor does not show would be read as if it were dense float32."""
    cpu_prepared.setup_torch(exchange)
    try:
        module, x = make(cell), torch.randn(4, 3, 5)
        hx = states(module, 3)
        with torch.no_grad():
            for _ in range(2):
                expected = module(x, hx)
            described, weights = module._packed.sequence._inference, module._weights()

            def served(x: Any = x, *given: Any, weights: Any = weights) -> Any:
                h, c = given or ((hx, None) if isinstance(hx, torch.Tensor) else hx)
                return cpu_prepared.library().infer(described, x, h, c, weights, 0)

            assert torch.equal(served()[0], expected[0])
            assert torch.equal(served(x, None, None)[0], module(x)[0])
            with torch.inference_mode():
                assert served()[0].is_inference()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of nested tensors, a prototype
                nested = torch.nested.nested_tensor([x[0], x[1]])
            others = {
                "shape": torch.randn(4, 2, 5), "rank": x[0], "ranks": x[None],
                "dtype": x.double(), "integers": x.int(), "strides": x.mT.contiguous().mT,
                "sign": torch._neg_view(x), "device": x.to("meta"), "sparse": x.to_sparse(),
                "nested": nested, "class": torch.nn.Parameter(x),
                "nothing": None, "list": [x],
            }  # fmt: skip
            for name, other in others.items():
                assert served(other) is None, name
            h, c = (hx, None) if isinstance(hx, torch.Tensor) else hx
            wide = torch.randn(1, 3, 8)
            pairs = [(wide, c), (h.double(), c), (torch._neg_view(h), c), (x, c)]
            pairs += [(h, wide), (None, h)] + ([] if c is None else [(h, None), (h, c.double())])
            for pair in pairs:
                assert served(x, *pair) is None, pair
            assert served(weights=weights[:-1]) is None
            assert served(weights=[]) is None
            assert served(weights=tuple(weights)) is None
            assert served(weights=[*weights[:-1], weights[-1].clone()]) is None
            with torch.autocast("cpu", torch.bfloat16):
                assert served() is None
            with torch.profiler.profile():
                assert served() is None
            with FakeTensorMode():
                assert served() is None
            assert served() is not None
            weights[-1].add_(0)
            assert served() is None
    finally:
        cpu_prepared.setup_torch()


@pytest.mark.parametrize("change", ["version", "words", "address", "strides", "sign", "gone"])
def test_a_description_notices_what_became_of_a_weight(change: str) -> None:
    module, x = fastrnn.RNN(5, 5).eval(), torch.randn(4, 3, 5)
    with torch.no_grad():
        for _ in range(2):
            module(x)
        described, weights = module._packed.sequence._inference, module._weights()
        infer = cpu_prepared.library().infer
        assert infer(described, x, None, None, weights, 0) is not None
        weight = module.weight_hh_l0
        if change == "version":
            weight.copy_(weight.clone())
        elif change == "words":
            weight.data.add_(1)
        elif change == "address":
            weight.data = weight.data.clone()
        elif change == "strides":
            weight.data = weight.data.t()
        elif change == "sign":
            weight.data = torch._neg_view(weight.data)
        else:
            module.weight_hh_l0 = torch.nn.Parameter(weight.clone())
            weights = module._weights()
        assert infer(described, x, None, None, weights, 0) is None
        theirs = torch.nn.RNN(5, 5)
        theirs.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(x)[0], theirs(x)[0])


def test_a_training_step_forgets_descriptions_of_what_it_trains() -> None:
    """A fused optimiser moves no version counter, and may change what no sample shows."""
    module, x = make("gru"), torch.randn(4, 3, 5)
    with torch.no_grad():
        for _ in range(2):
            module(x)
        module.step(x[0])
    assert module._packed.sequence is not None
    assert module._packed.stepper is not None
    module(x)
    assert module._packed.sequence is None
    assert module._packed.stepper is None


@pytest.mark.parametrize("exchange", [cpu_prepared.EXCHANGE, None], ids=["dlpack", "attributes"])
def test_tensors_that_resemble_those_described(exchange: Any) -> None:
    library, x = cpu_prepared.library(), torch.randn(4, 3, 5)
    weight, h = torch.nn.Parameter(torch.randn(7, 5)), torch.randn(1, 3, 7)
    cpu_prepared.setup_torch(exchange)
    try:
        likes = library.describe_likes([x, weight, h], 2)
        assert library.resemble(likes, [x, weight, h])
        assert library.resemble(likes, [x, weight])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nested tensors, a prototype
            nested = torch.nested.nested_tensor([x[0], x[1]])
        others = [
            x[:, :2], x[0], x.double(), x.int(), x.mT.contiguous().mT, torch._neg_view(x),
            x.to("meta"), x.to_sparse(), x.to_mkldnn(), nested, x.as_subclass(Tagged), None, [x],
        ]  # fmt: skip
        for other in others:
            assert not library.resemble(likes, [other, weight, h]), type(other)
        assert not library.resemble(likes, [x])
        assert not library.resemble(likes, [x, weight, h, h])
        assert not library.resemble(likes, (x, weight, h))
        with torch.autocast("cpu", torch.bfloat16):
            assert not library.resemble(likes, [x, weight, h])
            assert library.unobserved((x, None, weight))
        with FakeTensorMode():
            assert not library.resemble(likes, [x, weight, h])
            assert not library.unobserved((x, None, weight))
        with torch.profiler.profile():
            assert not library.resemble(likes, [x, weight, h])
            assert not library.unobserved((x, None, weight))
        assert library.unobserved((x, None, weight, x.mT, x.double()))
        for other in (torch._neg_view(x), x.to("meta"), x.as_subclass(Tagged)):
            assert not library.unobserved((x, other))
        inside = []
        torch.vmap(lambda t: inside.append(library.unobserved((x,))) or t)(torch.zeros(2))
        assert inside == [False]
        with pytest.raises(ValueError, match="invalid PyCapsule"):
            library.resemble("no description", [x])
    finally:
        cpu_prepared.setup_torch()


class Tagged(torch.Tensor):
    pass


def test_the_library_refuses_what_does_not_describe_a_call() -> None:
    library, x = cpu_prepared.library(), torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match="invalid PyCapsule"):
        library.run_forward("no description", *[None] * 9)
    with pytest.raises(TypeError, match="got 2 arguments, expected 10"):
        library.run_forward("no description", x)
    described = library.describe_forward((0, 0, 0, 0, 1, 1, 1, 1, 4, 4, 4, 0), (0,) * 25)
    with pytest.raises(ValueError, match="incorrect name"):
        library.run_backward(described, *[None] * 15)
    with pytest.raises(AttributeError, match="data_ptr"):
        library.run_forward(described, "no tensor", *[None] * 8)
    assert library.alike(x, (torch.Tensor,), x.shape, x.dtype)
    assert not library.alike(x, (torch.nn.Parameter,), x.shape, x.dtype)
    assert not library.alike(x, (torch.Tensor,), (1, 4), x.dtype)
    assert not library.alike(x, (torch.Tensor,), x.shape, torch.float64)
    assert not library.alike(x.expand(2, 1, 4), (torch.Tensor,), (2, 1, 4), x.dtype)
    assert not library.alike(torch._neg_view(x), (torch.Tensor,), x.shape, x.dtype)
    assert not library.alike(x.to("meta"), (torch.Tensor,), x.shape, x.dtype)
    assert not library.alike(None, (torch.Tensor,), x.shape, x.dtype)
    with pytest.raises(ValueError, match="invalid PyCapsule"):
        library.infer("no description", x, None, None, [], 0)
    with pytest.raises(ValueError, match="incorrect name"):
        library.infer(described, x, None, None, [], 0)
    with pytest.raises(ValueError, match="expected layers, origins of their weights and 3 layouts"):
        library.describe_inference((), (), x, x, None, (None,) * 3, 0, None)
    layouts = (cpu_prepared.layout_of(x),) * 2
    with pytest.raises(ValueError, match="incorrect name"):
        library.describe_inference((described,), (None,), x, x, None, (*layouts, None), 0, None)
