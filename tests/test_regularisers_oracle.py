"""Recurrent dropout, zoneout and weight dropout against loops in NumPy, through the modules.

The loops are written from the formulas; they take the masks from the random words alone, with the
seed that the call draws, and so also fix which word decides what.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastrnn
from fastrnn.reference import philox
from tests.tolerances import assert_close_by_rule

T, N, I, H, P_H, P_C, P = 5, 3, 4, 6, 0.3, 0.6, 0.4
RECURRENT, ZONEOUT_H, ZONEOUT_C, WEIGHT = range(4)
SEED = 12345
Array = NDArray[np.float64]

MODES = [("lstm", "update"), ("lstm", "cell"), ("lstm", "state"), ("gru", "update")]
MODES += [("gru", "state"), ("gru_before", "update"), ("gru_before", "state")]
MODES += [("rnn", "state"), ("rnn_relu", "state")]
CLASSES = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}


def build(cell: str, mode: str, **options: Any) -> torch.nn.Module:
    extra: dict[str, Any] = {"gru_before": {"reset_after": False}}.get(cell, {})
    if cell == "rnn_relu":
        extra = {"nonlinearity": "relu"}
    kind = CLASSES[cell.split("_")[0]]
    return kind(I, H, dtype=torch.float64, recurrent_dropout_mode=mode, **extra, **options)


def sigmoid(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


def keeps(seed: Tensor, layer: int, direction: int, kind: int, p: float, shape: Any) -> Array:
    stream = layer * 256 + direction * 16 + kind
    return philox.keep(seed, stream, p, *shape, torch.device("cpu")).numpy().astype(float)


def expected(module: Any, cell: str, x: Tensor, states: list[Tensor], seed: Tensor) -> list[Array]:
    """Output and final states of every layer and direction, by loops."""
    training, mode, p = module.training, module.recurrent_dropout_mode, module.recurrent_dropout
    per_sequence = module.recurrent_dropout_per == "sequence"
    zoneout = module.zoneout
    zone_h, zone_c = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
    value = x.numpy()
    finals: list[list[Array]] = [[] for _ in states]
    for layer in range(module.num_layers):
        outputs = []
        for d in range(1 + module.bidirectional):
            suffix = f"_l{layer}" + "_reverse" * d
            w_ih, w_hh, b_ih, b_hh = (
                getattr(module, name + suffix).detach().numpy()
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            if training and module.weight_dropout:
                q = module.weight_dropout
                w_hh = w_hh * keeps(seed, layer, d, WEIGHT, q, (1, *w_hh.shape))[0] / (1 - q)
            masks = {}
            for kind, rate in ((RECURRENT, p), (ZONEOUT_H, zone_h), (ZONEOUT_C, zone_c)):
                masks[kind] = np.full((T, N, H), 1 - rate)
                if training:
                    masks[kind] = keeps(seed, layer, d, kind, rate, (T, N, H))
            if per_sequence:
                masks[RECURRENT] = np.broadcast_to(masks[RECURRENT][:1], (T, N, H))
            h, *c = [s[layer * (1 + module.bidirectional) + d].numpy() for s in states]
            y = np.zeros((T, N, H))
            for t in sorted(range(T), reverse=d == 1):
                m = masks[RECURRENT][t]
                h_in = h
                if mode == "state" and p:
                    h_in = h * m / (1 - p) if training else h
                a, b = value[t] @ w_ih.T + b_ih, h_in @ w_hh.T + b_hh
                if cell == "lstm":
                    i, f, g, o = np.split(a + b, 4, axis=1)
                    added = sigmoid(i) * np.tanh(g) * (m if mode == "update" and p else 1)
                    c_new = sigmoid(f) * c[0] + added
                    c_new = c_new * (m if mode == "cell" and p else 1)
                    h_new = sigmoid(o) * np.tanh(c_new)
                    w = masks[ZONEOUT_C][t]
                    c = [w * c_new + (1 - w) * c[0]]
                elif cell.startswith("gru"):
                    r, z = sigmoid((a + b)[:, :H]), sigmoid((a + b)[:, H : 2 * H])
                    if cell == "gru":
                        n = np.tanh(a[:, 2 * H :] + r * b[:, 2 * H :])
                    else:
                        inner = (r * h_in) @ w_hh[2 * H :].T + b_hh[2 * H :]
                        n = np.tanh(a[:, 2 * H :] + inner)
                    h_new = (1 - z) * n * (m if mode == "update" and p else 1) + z * h
                else:
                    h_new = np.maximum(a + b, 0) if cell == "rnn_relu" else np.tanh(a + b)
                w = masks[ZONEOUT_H][t]
                h = w * h_new + (1 - w) * h
                y[t] = h
            outputs.append(y)
            for final, state in zip(finals, [h, *c], strict=True):
                final.append(state)
        value = np.concatenate(outputs, axis=2)
    return [value, *(np.stack(f) for f in finals)]


def compare(module: Any, cell: str) -> None:
    x = torch.randn(T, N, I, dtype=torch.float64)
    layers = module.num_layers * (1 + module.bidirectional)
    states = [torch.randn(layers, N, H, dtype=torch.float64) for _ in range(1 + (cell == "lstm"))]
    torch.manual_seed(SEED)
    seed = torch.randint(0, (1 << 63) - 1, (1,))
    want = expected(module, cell, x, states, seed)
    for backend in ("cpu", "reference"):
        torch.manual_seed(SEED)
        with fastrnn.use_backend(backend), torch.no_grad():
            y, state = module(x, tuple(states) if cell == "lstm" else states[0])
        got = [y, *(state if cell == "lstm" else [state])]
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            truth = torch.from_numpy(np.ascontiguousarray(b))
            assert_close_by_rule(f"{backend}: result {i}", a, truth, truth)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("per", ["step", "sequence"])
@pytest.mark.parametrize(("cell", "mode"), MODES)
def test_recurrent_dropout(cell: str, mode: str, per: str, training: bool) -> None:
    module = build(cell, mode, recurrent_dropout=P, recurrent_dropout_per=per)
    compare(module.train(training), cell)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_before", "rnn", "rnn_relu"])
def test_zoneout(cell: str, training: bool) -> None:
    pairs = [P_H] + ([(P_H, P_C), (0.0, P_C), (P_H, 0.0)] if cell == "lstm" else [])
    mode = "state" if cell.startswith("rnn") else "update"
    for zoneout in pairs:
        compare(build(cell, mode, zoneout=zoneout).train(training), cell)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_before", "rnn"])
def test_weight_dropout(cell: str, training: bool) -> None:
    mode = "state" if cell.startswith("rnn") else "update"
    compare(build(cell, mode, weight_dropout=P, num_layers=2).train(training), cell)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("cell", "mode"), MODES)
def test_all_together(cell: str, mode: str, training: bool) -> None:
    """Two layers, both directions, every regulariser at once: no mask stands for another."""
    module = build(
        cell, mode, recurrent_dropout=P, zoneout=(P_H, P_C) if cell == "lstm" else P_H,
        weight_dropout=0.5, num_layers=2, bidirectional=True,
    )  # fmt: skip
    compare(module.train(training), cell)


@pytest.mark.parametrize(("cell", "mode"), MODES)
def test_probabilities_at_the_ends(cell: str, mode: str) -> None:
    """p = 1 drops everything and p = 0 nothing, exactly, and no infinity comes of 1 / (1 - p)."""
    x = torch.randn(T, N, I, dtype=torch.float64)
    for backend, p in itertools.product(("cpu", "reference"), (0.0, 1.0)):
        with fastrnn.use_backend(backend):
            module = build(cell, mode, recurrent_dropout=p)
            plain = build(cell, mode)
            plain.load_state_dict(module.state_dict())
            if p and mode == "state":
                for name, weight in plain.named_parameters():
                    if "weight_hh" in name:
                        weight.data.zero_()
            y, expected_y = module(x)[0], plain(x)[0]
            if p == 0 or mode == "state":
                assert torch.equal(y, expected_y)
            elif cell == "lstm":
                assert not y.any()
            else:
                assert not y.any()  # (1 - z) * 0 + z * 0
            zoned = build(cell, mode, zoneout=p)
            zoned.load_state_dict(module.state_dict())
            if p:
                assert not zoned(x)[0].any()
            else:
                assert torch.equal(zoned(x)[0], build_like(zoned, cell, mode)(x)[0])
            dropped = build(cell, mode, weight_dropout=p)
            dropped.load_state_dict(plain.state_dict())
            if p and mode == "state":
                assert torch.equal(dropped(x)[0], expected_y)
            assert dropped(x)[0].isfinite().all()


def build_like(module: torch.nn.Module, cell: str, mode: str) -> torch.nn.Module:
    plain = build(cell, mode)
    plain.load_state_dict(module.state_dict())
    return plain
