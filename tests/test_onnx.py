"""fastrnn.onnx: layers as ONNX's own operators, their values checked in ONNX Runtime."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fastrnn
from tests.tolerances import assert_close_by_rule

pytest.importorskip("onnxscript", reason="onnxscript is not installed: `make build` brings it")
onnxruntime = pytest.importorskip("onnxruntime")

import fastrnn.onnx  # noqa: E402

pytestmark = [
    pytest.mark.compile,
    # torch's exporter warns about its own deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

LAYERS = {
    "lstm": (fastrnn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "lstm no bias": (fastrnn.LSTM, {"bias": False}),
    "lstm batch first": (fastrnn.LSTM, {"batch_first": True, "bidirectional": True}),
    "gru": (fastrnn.GRU, {"num_layers": 2, "bidirectional": True}),
    "gru reset before": (fastrnn.GRU, {"reset_after": False, "num_layers": 2}),
    "gru reset before, both": (fastrnn.GRU, {"reset_after": False, "bidirectional": True}),
    "rnn tanh": (fastrnn.RNN, {"num_layers": 2, "bidirectional": True}),
    "rnn relu": (fastrnn.RNN, {"nonlinearity": "relu", "batch_first": True}),
    "state": (fastrnn.LSTM, {"num_layers": 2, "dropout": 0.5, "weight_dropout": 0.5}),
    "lengths": (fastrnn.GRU, {"batch_first": True, "bidirectional": True}),
    "lengths, reset before": (fastrnn.GRU, {"batch_first": True, "reset_after": False}),
    "lengths, lstm": (fastrnn.LSTM, {"batch_first": True, "bidirectional": True}),
    "lengths, rnn": (fastrnn.RNN, {"batch_first": True, "bidirectional": True}),
    "lstm cell": (fastrnn.LSTMCell, {}),
    "gru cell": (fastrnn.GRUCell, {}),
    "rnn cell": (fastrnn.RNNCell, {"nonlinearity": "relu"}),
    "replaced": (nn.GRU, {"num_layers": 2}),
}
NODES = {"LSTM": 8, "GRU": 10, "RNN": 5}  # one for each layer of each of these


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


class Zoo(nn.Module):
    """Every layer above beside each other: one export says it of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make(3, 4, **options) for make, options in LAYERS.values()])

    def forward(self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor) -> list[list[Tensor]]:
        outputs = []
        for name, layer in zip(LAYERS, self.layers, strict=True):
            if name.endswith("cell"):
                outputs.append(flat(layer(x[0])))
            elif name == "state":
                outputs.append(flat(layer(x, (h, c))))
            elif name.startswith("lengths"):
                outputs.append(flat(layer(x.transpose(0, 1), lengths=lengths)))
            else:
                x_here = x.transpose(0, 1) if layer.batch_first else x
                outputs.append(flat(layer(x_here)))
        return outputs


def arguments(steps: int, size: int, lengths: list[int]) -> tuple[Tensor, ...]:
    states = torch.randn(2, 2, size, 4).unbind()
    return torch.randn(steps, size, 3), *states, torch.tensor(lengths)


def run(program: Any, args: tuple[Tensor, ...]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), args, strict=True)}
    return list(session.run(None, feed))


@functools.cache
def zoo() -> tuple[Zoo, Any]:
    model = fastrnn.replace(Zoo().eval())
    steps, size = Dim("steps", min=2, max=1000), Dim("size", min=2, max=1000)
    shapes = ({0: steps, 1: size}, {1: size}, {1: size}, {0: size})
    args = arguments(5, 3, [5, 2, 3])
    return model, fastrnn.onnx.export(model, args, dynamic_shapes=shapes, verbose=False)


def in_double(model: nn.Module, args: tuple[Tensor, ...]) -> Any:
    wide = copy.deepcopy(model).double()
    return wide(*(t.double() if t.is_floating_point() else t for t in args))


@functools.cache
def results(steps: int) -> dict[str, tuple[list[Tensor], ...]]:
    """Layer to (ONNX Runtime's values, fastrnn's in float64, fastrnn's)."""
    model, program = zoo()
    args = arguments(steps, 4, [steps, 1, 4, 3])
    got = iter(run(program, args))
    with torch.no_grad():
        same = model(*args)
        wide = in_double(model, args)
    return {
        name: ([torch.from_numpy(next(got)) for _ in a], b, a)
        for name, a, b in zip(LAYERS, same, wide, strict=True)
    }


@pytest.mark.parametrize("steps", [5, 11])
@pytest.mark.parametrize("name", LAYERS)
def test_values_in_onnx_runtime(name: str, steps: int) -> None:
    """Other sizes than those exported with, too: steps and rows are dynamic."""
    got, wide, same = results(steps)[name]
    for i, (a, b, c) in enumerate(zip(got, wide, same, strict=True)):
        assert_close_by_rule(f"output {i}", a, b, c)


def test_one_node_for_each_layer() -> None:
    """Nothing is unrolled, and weights are put in order while exporting, not while running."""
    operators = Counter(node.op_type for node in zoo()[1].model.graph)
    assert {name: operators[name] for name in NODES} == NODES
    assert not operators["Loop"]
    assert not operators["Tanh"]


def test_a_translation_table_for_a_call_of_torch() -> None:
    model = nn.Sequential(nn.Linear(3, 3), fastrnn.RNN(3, 4)).eval()
    x = torch.randn(5, 2, 3)
    table = fastrnn.onnx.translation_table()
    with torch.no_grad():
        program = torch.onnx.export(
            model, (x,), dynamo=True, custom_translation_table=table, verbose=False
        )
        same, wide = flat(model(x)), flat(in_double(model, (x,)))
    for i, (a, b, c) in enumerate(zip(run(program, (x,)), wide, same, strict=True)):
        assert_close_by_rule(f"output {i}", torch.from_numpy(a), b, c)


def test_restored_model_needs_no_table() -> None:
    model = nn.Sequential(nn.Linear(3, 3), fastrnn.LSTM(3, 4, 2)).eval()
    x = torch.randn(5, 2, 3)
    plain = fastrnn.restore(copy.deepcopy(model))
    program = torch.onnx.export(plain, (x,), dynamo=True, verbose=False)
    with torch.no_grad():
        same, wide = flat(model(x)), flat(in_double(model, (x,)))
    for i, (a, b, c) in enumerate(zip(run(program, (x,)), wide, same, strict=True)):
        assert_close_by_rule(f"output {i}", torch.from_numpy(a), b, c)


def _with(layer: nn.Module, **extra: Any) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Any:
            return self.layer(x, **extra)

    return Model()


REFUSED = {
    "proj_size": lambda: fastrnn.LSTM(3, 4, proj_size=2),
    "reset": lambda: _with(fastrnn.GRU(3, 4), reset=torch.zeros(5, 2, dtype=torch.bool)),
    "RHN": lambda: fastrnn.RHN(3, 4),
    "BNLSTM": lambda: fastrnn.BNLSTM(3, 4, max_length=5),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_onnx_cannot_say_is_an_error(what: str) -> None:
    model = REFUSED[what]().eval()
    with pytest.raises(ValueError, match=rf"^{what}.*ONNX"):
        fastrnn.onnx.export(model, (torch.randn(5, 2, 3),), verbose=False)


@pytest.mark.parametrize(
    "cell, used, what",
    [
        ("gru_layer_norm", {}, "layer_norm=True"),
        ("lstm", {"return_cells": True}, "return_cells=True"),
        ("lstm", {"noise": "z"}, "zoneout"),
        ("rnn_tanh", {"batch_sizes": torch.ones(5)}, "a PackedSequence"),
        ("gru", {"seed": torch.ones(1)}, "a layer in training"),
    ],
)
def test_options_onnx_cannot_say_are_errors(cell: str, used: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=rf"^{what}.*ONNX"):
        fastrnn.onnx._check(cell, 4, 1, **used)
    fastrnn.onnx._check("lstm", 8, 2, seed=None, noise="", return_cells=False)


def test_arguments() -> None:
    x = torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"model: .*training.*call model.eval\(\)"):
        fastrnn.onnx.export(fastrnn.GRU(3, 4), (x,))
    model = nn.Sequential(fastrnn.LSTM(3, 4, 2, dropout=0.5), nn.Identity()).eval()
    model[0].train()
    with pytest.raises(
        ValueError, match=r"model: got 0, a module of type LSTM, in training.*model.eval\(\)"
    ):
        fastrnn.onnx.export(model, (x,))
    with pytest.raises(ValueError, match=r"dynamo: got False.*fastrnn.restore"):
        fastrnn.onnx.export(fastrnn.GRU(3, 4).eval(), (x,), dynamo=False)


def test_other_errors_of_the_exporter_are_its_own() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum() if x.sum() > 0 else x

    with pytest.raises(torch.onnx.OnnxExporterError):
        fastrnn.onnx.export(Broken().eval(), (torch.randn(5),), verbose=False)
