"""Padding that nothing uses: lengths far below T, as where every batch is padded to one length.

A backward walks from the end of time in chunks of steps. Whole chunks are then past the end of
every row, and what the weight gradients are added to is fresh memory, here full of NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from tests.tolerances import assert_close_by_rule

STEPS, ROWS, FEATURES, HIDDEN = 300, 4, 3, 5
LENGTHS = (100, 50, 7, 60)
# BNLSTM: two rows are left after step 60, and their variance enlarges roundings by 1 / eps.
MODULES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: fastrnn.LSTM(FEATURES, HIDDEN),
    "lstm-both-directions": lambda: fastrnn.LSTM(FEATURES, HIDDEN, bidirectional=True),
    "lstm-recompute": lambda: fastrnn.LSTM(FEATURES, HIDDEN, recompute=True),
    "lstm-proj": lambda: fastrnn.LSTM(FEATURES, HIDDEN, proj_size=2),
    "lstm-layer-norm": lambda: fastrnn.LSTM(FEATURES, HIDDEN, layer_norm=True),
    "lstm-dropped-state": lambda: fastrnn.LSTM(
        FEATURES, HIDDEN, recurrent_dropout=0.5, recurrent_dropout_mode="state"
    ),
    "gru": lambda: fastrnn.GRU(FEATURES, HIDDEN),
    "gru-reset-before": lambda: fastrnn.GRU(FEATURES, HIDDEN, reset_after=False),
    "gru-layer-norm": lambda: fastrnn.GRU(FEATURES, HIDDEN, layer_norm=True),
    "rnn": lambda: fastrnn.RNN(FEATURES, HIDDEN, bidirectional=True),
    "rhn": lambda: fastrnn.RHN(FEATURES, HIDDEN, depth=2),
    "rhn-both-directions": lambda: fastrnn.RHN(
        FEATURES, HIDDEN, depth=2, bidirectional=True, recompute=True
    ),
    "bnlstm": lambda: fastrnn.BNLSTM(
        FEATURES, HIDDEN, max_length=STEPS, eps=0.1, bidirectional=True
    ),
    "bnlstm-sequence": lambda: fastrnn.BNLSTM(
        FEATURES, HIDDEN, max_length=STEPS, eps=0.1, input_stats="sequence"
    ),
}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(module: nn.Module, x: Tensor, dy: Tensor, backend: str) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with fastrnn.use_backend(backend):
        y, _ = module(x, lengths=torch.tensor(LENGTHS))
    y.backward(dy)
    tensors = {"x": x, **dict(module.named_parameters())}
    return {"y": y} | {n: t.grad.clone() for n, t in tensors.items() if t.grad is not None}


@pytest.mark.parametrize("name", MODULES)
def test_gradients_where_all_rows_end_early(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().double()
    x = torch.randn(STEPS, ROWS, FEATURES, dtype=torch.float64)
    with torch.no_grad():
        dy = torch.randn_like(module(x)[0])
    got = gradients(module, x, dy, "cpu")
    expected = gradients(module, x, dy, "reference")
    for tensor, truth in expected.items():
        assert_close_by_rule(tensor, got[tensor], truth, truth)


def test_bfloat16_gradients_do_not_start_from_what_memory_held() -> None:
    torch.manual_seed(0)
    module = fastrnn.LSTM(FEATURES, HIDDEN, dtype=torch.bfloat16)
    x = torch.randn(STEPS, ROWS, FEATURES, dtype=torch.bfloat16)
    dy = torch.randn(STEPS, ROWS, HIDDEN, dtype=torch.bfloat16)
    got = gradients(module, x, dy, "cpu")
    same = gradients(module, x, dy, "reference")
    truth = gradients(module.double(), x.double(), dy.double(), "reference")
    for tensor, value in truth.items():
        assert_close_by_rule(tensor, got[tensor], value, same[tensor])
