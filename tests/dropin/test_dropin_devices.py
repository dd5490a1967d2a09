"""Meta device, conversions between dtypes, and autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dropin_cases import (
    Kind,
    assert_alike,
    compare,
    gradients,
    leaf,
    loss_of,
    outcome,
    random_packed,
    random_state,
    results,
    tensors,
    twins,
)
from torch import Tensor

X = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_forward_on_meta(any_kind: Kind, training: bool, batch_first: bool, grad: bool) -> None:
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first, "device": "meta"}
    outputs = []
    for build in (any_kind.ours, any_kind.theirs):
        module = build(6, 6, **options).train(training)
        with torch.set_grad_enabled(grad):
            for _ in range(3):  # prepared calls begin at the second of a shape
                found = tensors(module(X.to("meta")))
        outputs.append(found)
    for mine, other in zip(*outputs, strict=True):
        assert mine.is_meta
        assert (mine.shape, mine.dtype, mine.requires_grad) == (other.shape, other.dtype, grad)


def test_backward_on_meta(any_kind: Kind) -> None:
    for build in (any_kind.ours, any_kind.theirs):
        module = build(6, 6, device="meta")
        module(X.to("meta"))[0].sum().backward()
        assert all(p.grad.shape == p.shape and p.grad.is_meta for p in module.parameters())


def test_from_meta_by_to_empty(any_kind: Kind) -> None:
    ours, theirs = (
        any_kind.ours(6, 6, num_layers=2, device="meta"),
        any_kind.theirs(6, 6, num_layers=2),
    )
    ours = ours.to_empty(device="cpu")
    assert all(w is p for w, p in zip(ours._flat_weights, ours.parameters(), strict=True))
    ours.load_state_dict(theirs.state_dict())
    compare(ours, theirs, outcome, X)


def test_from_meta_by_assignment(any_kind: Kind) -> None:
    ours, theirs = any_kind.ours(6, 6, device="meta"), any_kind.theirs(6, 6)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=True)
    compare(ours, theirs, outcome, X)


def test_from_meta_by_reset(any_kind: Kind) -> None:
    built = []
    for build in (any_kind.ours, any_kind.theirs):
        module = build(6, 6, device="meta").to_empty(device="cpu")
        torch.manual_seed(1)
        module.reset_parameters()
        built.append(module)
    compare(*built, outcome, X)


@pytest.mark.parametrize("via", ["double", "to", "type"])
def test_converted_to_float64_and_back(any_kind: Kind, via: str) -> None:
    ours, theirs = twins(any_kind, 6, 6, num_layers=2)
    results(ours, X)
    for module in (ours, theirs):
        if via == "double":
            module.double()
        else:
            getattr(module, via)(torch.float64)
        assert all(w.dtype == torch.float64 for w in module._flat_weights)
    compare(ours, theirs, outcome, X)
    compare(ours.float(), theirs.float(), outcome, X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_inference_in_half_precision(any_kind: Kind, dtype: torch.dtype, packed: bool) -> None:
    ours, theirs = twins(any_kind, 6, 6, num_layers=2, bidirectional=True)
    x = random_packed(6, [2, 5, 3]) if packed else X
    compare_rounded(ours.to(dtype), theirs.to(dtype), results, x, random_state(ours, 3))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_training_in_bfloat16(kind: Kind, packed: bool) -> None:
    ours, theirs = twins(kind, 6, 6, num_layers=2, bidirectional=True, dtype=torch.bfloat16)
    x = random_packed(6, [2, 5, 3]) if packed else X
    compare_rounded(ours, theirs, outcome, x, random_state(ours, 3))


def compare_rounded(ours: Any, theirs: Any, run: Any, *args: Any) -> None:
    """`compare` with arguments that are exact in every dtype, so that all see the same."""
    rounded = [rounded_to_eighths(a) for a in args]
    compare(ours, theirs, run, *rounded)


def rounded_to_eighths(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value * 8).round() / 8
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return type(value)(rounded_to_eighths(value.data), *value[1:])
    return tuple(rounded_to_eighths(v) for v in value)


def autocast_outcome(module: Any, x: Any, hx: Any, input_dtype: torch.dtype) -> dict[str, Tensor]:
    """Training under autocast; in float64, which is the truth, without it."""
    exact = next(module.parameters()).dtype == torch.float64
    dtype = torch.float64 if exact else input_dtype
    x, hx = leaf(x, dtype), leaf(hx, torch.float64 if exact else torch.float32)
    module.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not exact):
        outputs = tensors(module(x, hx))
    loss_of([out.double() for out in outputs]).backward()
    named = {f"out[{i}]": t.detach() for i, t in enumerate(outputs)}
    return {**named, **gradients(module, x, hx)}


def compare_autocast(ours: Any, theirs: Any, *args: Any) -> None:
    """Both libraries round to bfloat16 inside, whatever the dtype of what they return."""
    got, same = autocast_outcome(ours, *args), autocast_outcome(theirs, *args)
    ref64 = autocast_outcome(copy.deepcopy(theirs).double(), *args)
    for name, value in got.items():
        assert value.dtype == same[name].dtype, name
    as_bfloat16 = [{n: t.bfloat16() for n, t in found.items()} for found in (got, same)]
    assert_alike(as_bfloat16[0], ref64, as_bfloat16[1])


@pytest.mark.parametrize(
    "input_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "hx"])
def test_autocast(any_kind: Kind, input_dtype: torch.dtype, with_state: bool) -> None:
    ours, theirs = twins(any_kind, 6, 6, num_layers=2)
    plain = isinstance(theirs, torch.nn.LSTM) and not theirs.proj_size
    if plain and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch.nn.LSTM under bfloat16 autocast needs oneDNN's kernels of AVX-512")
    x = rounded_to_eighths(X)
    hx = rounded_to_eighths(random_state(ours, 3)) if with_state else None
    compare_autocast(ours, theirs, x, hx, input_dtype)


def test_autocast_keeps_weights_and_later_calls(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours(X)
        with torch.no_grad():
            ours(X)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    compare(ours, theirs, results, X)
    compare(ours, theirs, outcome, X)


def test_autocast_disabled_inside(any_kind: Kind) -> None:
    ours, theirs = twins(any_kind, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        compare(ours, theirs, outcome, X)
