"""Forward-mode derivatives (``torch.autograd.forward_ad``): tangents are carried, never dropped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fastrnn

# torch's own: it compiles decompositions for the tangents.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MODULES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: fastrnn.LSTM(3, 4, 2),
    "gru": lambda: fastrnn.GRU(3, 4),
    "rnn": lambda: fastrnn.RNN(3, 4),
    "rhn": lambda: fastrnn.RHN(3, 4, depth=2),
    "bnlstm": lambda: fastrnn.BNLSTM(3, 4, max_length=5),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_tangents(name: str, grad: bool) -> None:
    module = MODULES[name]().double().eval()
    x, v = torch.randn(2, 5, 3, 3, dtype=torch.float64).unbind(0)
    with torch.no_grad():
        for _ in range(3):  # so that a prepared call exists
            module(x)
        moved = [module(x + s * 1e-6 * v)[0] for s in (1, -1)]
    expected = (moved[0] - moved[1]) / 2e-6
    with nullcontext() if grad else torch.no_grad(), forward_ad.dual_level():
        y = module(forward_ad.make_dual(x, v))[0]
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent.detach(), expected, rtol=1e-5, atol=1e-7)
