"""A module on the CPU computes the same whatever torch's default device is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_same_bits

import fastrnn
import fastrnn.init

LAYERS = {
    "lstm": lambda: fastrnn.LSTM(5, 7, num_layers=2, dropout=0.3, bidirectional=True),
    "gru": lambda: fastrnn.GRU(5, 7, batch_first=True),
    "rnn": lambda: fastrnn.RNN(5, 7),
    "layer_norm": lambda: fastrnn.LSTM(5, 7, layer_norm=True),
    "recurrent_dropout": lambda: fastrnn.GRU(5, 7, recurrent_dropout=0.4, zoneout=0.1),
    "weight_dropout": lambda: fastrnn.LSTM(5, 7, weight_dropout=0.4),
    "rhn": lambda: fastrnn.RHN(5, 7, depth=2, variational_input=0.3, variational_state=0.3),
    "bnlstm": lambda: fastrnn.BNLSTM(5, 7, max_length=4),
}
CELLS = {
    "lstm": lambda: fastrnn.LSTMCell(5, 7),
    "gru": lambda: fastrnn.GRUCell(5, 7),
    "rnn": lambda: fastrnn.RNNCell(5, 7),
}


def tensors(value: Any) -> list[torch.Tensor]:
    """Those in results, which hold the number of the step where BNLSTM.step returns a state."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


def outcome(module: torch.nn.Module, training: bool, *args: Any, **options: Any) -> list[Any]:
    """Results and gradients of calls enough for every prepared way, running statistics among them.

    Nothing here makes a tensor on its own, which would follow the default device.
    """
    module.train(training)
    found = []
    for _ in range(3):
        torch.manual_seed(3)
        module.zero_grad()
        results = tensors(module(*args, **options))
        torch.autograd.backward(results, [r.detach() for r in results])
        found += [r.detach() for r in results] + [p.grad.clone() for p in module.parameters()]
        with torch.no_grad():
            found += tensors(module(*args, **options))
    return found + [b.clone() for b in module.buffers()]


def compare(build: Any, training: bool, *args: Any, **options: Any) -> None:
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(2)
        module = build()
        with torch.device(device):
            found.append(outcome(module, training, *args, **options))
    for i, (expected, got) in enumerate(zip(*found, strict=True)):
        assert_same_bits(f"[{i}]", got, expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, training: bool) -> None:
    x = torch.randn(4, 4, 5)
    compare(LAYERS[name], training, x)
    compare(LAYERS[name], training, x, lengths=[4, 2, 3, 1])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3, 3, 1]))
    if name != "gru":
        compare(lambda: Data(LAYERS[name](), packed), training, packed.data)


class Data(torch.nn.Module):
    """A layer called with a packed sequence, which gives tensors."""

    def __init__(self, layer: Any, packed: Any) -> None:
        super().__init__()
        self.layer, self.packed = layer, packed

    def forward(self, data: torch.Tensor) -> Any:
        output, state = self.layer(self.packed._replace(data=data))
        return output.data, state


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, training: bool) -> None:
    compare(CELLS[name], training, torch.randn(4, 5))


@pytest.mark.parametrize("name", ["lstm", "recurrent_dropout", "rhn", "bnlstm"])
def test_step(name: str) -> None:
    build = LAYERS[name] if name != "lstm" else lambda: fastrnn.LSTM(5, 7)
    module, x = build(), torch.randn(4, 5)
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device), torch.no_grad():
            torch.manual_seed(3)
            found.append(tensors([module.eval().step(x) for _ in range(3)]))
    for expected, got in zip(*found, strict=True):
        assert_same_bits("step", got, expected)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("name", ["np_rnn_", "orthogonal_gates_", "unitary_"])
def test_initial_values(name: str, seeded: bool) -> None:
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(5)
        options = {"generator": torch.Generator("cpu").manual_seed(6)} if seeded else {}
        weight = torch.empty(12, 4)
        with torch.device(device):
            found.append(getattr(fastrnn.init, name)(weight, **options).clone())
    assert_same_bits(name, found[1], found[0])


def test_identity() -> None:
    weight = torch.empty(8, 4)
    with torch.device("meta"):
        fastrnn.init.identity_(weight, 0.5)
    assert_same_bits("weight", weight, 0.5 * torch.eye(4).repeat(2, 1))
