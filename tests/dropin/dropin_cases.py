"""What the drop-in tests share: library under test, kinds of module, how two are compared.

The library is fastrnn; DROPIN_LIBRARY=torch.nn puts torch.nn in both roles, which tests the tests.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tolerances import assert_close_by_rule
from tolerances import assert_same_bits as assert_same_tensor_bits
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

LIBRARY = importlib.import_module(os.environ.get("DROPIN_LIBRARY", "fastrnn"))


@dataclass(frozen=True)
class Kind:
    """One class of torch.nn with the options that select its variant."""

    id: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_cell_state(self) -> bool:
        return self.name.startswith("LSTM")

    def ours(self, *args: Any, **options: Any) -> nn.Module:
        return getattr(LIBRARY, self.name)(*args, **{**self.options, **options})

    def theirs(self, *args: Any, **options: Any) -> nn.Module:
        return getattr(nn, self.name)(*args, **{**self.options, **options})


KINDS = [
    Kind("lstm", "LSTM"),
    Kind("gru", "GRU"),
    Kind("rnn_tanh", "RNN", {"nonlinearity": "tanh"}),
    Kind("rnn_relu", "RNN", {"nonlinearity": "relu"}),
]
PROJECTED = Kind("lstm_proj", "LSTM", {"proj_size": 3})
CELLS = [
    Kind("lstm_cell", "LSTMCell"),
    Kind("gru_cell", "GRUCell"),
    Kind("rnn_tanh_cell", "RNNCell", {"nonlinearity": "tanh"}),
    Kind("rnn_relu_cell", "RNNCell", {"nonlinearity": "relu"}),
]


def twins(kind: Kind, *sizes: int, **options: Any) -> tuple[Any, Any]:
    """A module of the library and one of torch.nn with the same weights."""
    theirs = kind.theirs(*sizes, **options)
    ours = kind.ours(*sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def random_state(module: Any, batch: int | None) -> Any:
    """A random hx for `module`, 2-D if `batch` is None."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    shape = (rows,) if batch is None else (rows, batch)
    hidden = torch.randn(*shape, module.proj_size or module.hidden_size)
    if module.mode != "LSTM":
        return hidden
    return hidden, torch.randn(*shape, module.hidden_size)


def random_packed(features: int, lengths: list[int], sort: bool = False) -> PackedSequence:
    """A packed batch; `sort` tells pack_sequence that the lengths come sorted."""
    return pack_sequence([torch.randn(n, features) for n in lengths], enforce_sorted=sort)


def leaf(value: Any, dtype: torch.dtype) -> Any:
    """Leaves of `dtype` made of a tensor, tuple or PackedSequence; strides kept if it has it."""
    if isinstance(value, PackedSequence):
        data = value.data.detach().to(dtype).requires_grad_()
        return PackedSequence(data, *value[1:])
    if isinstance(value, Tensor):
        return value.detach().to(dtype).requires_grad_()
    return None if value is None else tuple(leaf(v, dtype) for v in value)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a module's arguments or results, in order; of a PackedSequence its data."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [] if value is None else [t for v in value for t in tensors(v)]


def called_with(input: Any, hx: Any) -> tuple[Any, ...]:
    return (input,) if hx is None else (input, hx)


def results(module: nn.Module, input: Any, hx: Any = None) -> dict[str, Tensor]:
    """Outputs of a forward pass without gradients, in the dtype of the module."""
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        returned = module(*called_with(leaf(input, dtype), leaf(hx, dtype)))
    return {f"out[{i}]": t for i, t in enumerate(tensors(returned))}


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A scalar that weighs every element of every output differently."""
    total = outputs[0].new_zeros(())
    for out in outputs:
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
        total = total + (out * weight.to(out.dtype)).sum()
    return total


def gradients(module: nn.Module, input: Any = None, hx: Any = None) -> dict[str, Tensor]:
    """The gradients that a backward pass left: of leaf input, leaf hx and every parameter."""
    parameters = module.named_parameters()
    found = {f"d{name}": p.grad.clone() for name, p in parameters if p.grad is not None}
    for name, value in (("input", input), ("hx", hx)):
        for i, t in enumerate(tensors(value)):
            if t.grad is not None:
                found[f"d{name}[{i}]"] = t.grad.clone()
    return found


def outcome(module: nn.Module, input: Any, hx: Any = None) -> dict[str, Tensor]:
    """Outputs and every gradient of one forward and backward pass in the dtype of the module."""
    dtype = next(module.parameters()).dtype
    input, hx = leaf(input, dtype), leaf(hx, dtype)
    module.zero_grad(set_to_none=True)
    outputs = tensors(module(*called_with(input, hx)))
    loss_of(outputs).backward()
    named = {f"out[{i}]": t.detach() for i, t in enumerate(outputs)}
    return {**named, **gradients(module, input, hx)}


def assert_alike(got: dict[str, Tensor], ref64: dict[str, Tensor], same: dict[str, Tensor]) -> None:
    """Same names, shapes and dtypes as torch.nn, values within the rule of tests/tolerances.py."""
    assert got.keys() == same.keys()
    for name, value in got.items():
        assert value.shape == same[name].shape, name
        assert value.dtype == same[name].dtype, name
        assert_close_by_rule(name, value, ref64[name], same[name])


def compare(
    ours: nn.Module, theirs: nn.Module, run: Callable[..., dict[str, Tensor]], *args: Any
) -> None:
    """Compare run(module, *args) of both libraries, torch.nn in float64 being the truth."""
    wide = copy.deepcopy(theirs).double()
    assert_alike(run(ours, *args), run(wide, *args), run(theirs, *args))


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert_same_tensor_bits(name, value, second[name])


def raised(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[type[Exception], str]:
    """Type and text of what `call(*args, **options)` raises."""
    try:
        call(*args, **options)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("nothing was raised")
