"""Every module and option that fastrnn has, on the CUDA backend, against the float64 reference.

What a backend does not serve is asked of it: the refusal is the reason of the skip, so a cell that
a backend learns is tested from that day on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from tests.gpu.on_gpu import multiplied_as, settle
from tests.tolerances import assert_close_by_rule

I, H, T, N = 12, 40, 6, 5
Make = Callable[..., nn.Module]

MODULES: dict[str, Make] = {
    "lstm": lambda **k: fastrnn.LSTM(I, H, **k),
    "lstm-2-layers": lambda **k: fastrnn.LSTM(I, H, 2, **k),
    "lstm-both": lambda **k: fastrnn.LSTM(I, H, bidirectional=True, **k),
    "lstm-proj": lambda **k: fastrnn.LSTM(I, H, proj_size=16, **k),
    "lstm-layer-norm": lambda **k: fastrnn.LSTM(I, H, layer_norm=True, **k),
    "lstm-recompute": lambda **k: fastrnn.LSTM(I, H, recompute=True, **k),
    "lstm-zoneout": lambda **k: fastrnn.LSTM(I, H, zoneout=0.2, **k),
    "lstm-weight-dropout": lambda **k: fastrnn.LSTM(I, H, weight_dropout=0.3, **k),
    "gru": lambda **k: fastrnn.GRU(I, H, **k),
    "gru-reset-before": lambda **k: fastrnn.GRU(I, H, reset_after=False, **k),
    "gru-layer-norm": lambda **k: fastrnn.GRU(I, H, layer_norm=True, **k),
    "gru-zoneout": lambda **k: fastrnn.GRU(I, H, zoneout=0.2, **k),
    # relu is tested with its branches held, in test_gpu_layer.py
    "rnn-tanh": lambda **k: fastrnn.RNN(I, H, **k),
    "rhn": lambda **k: fastrnn.RHN(I, H, depth=3, **k),
    "rhn-deep": lambda **k: fastrnn.RHN(I, H, depth=10, **k),
    "rhn-uncoupled": lambda **k: fastrnn.RHN(I, H, depth=2, couple_carry=False, **k),
    "rhn-masks": lambda **k: fastrnn.RHN(
        I, H, depth=2, variational_input=0.2, variational_state=0.3, **k
    ),
    "rhn-gate-masks": lambda **k: fastrnn.RHN(
        I, H, depth=2, variational_state=0.3, tie_gate_masks=False, **k
    ),
    "rhn-beyond": lambda **k: fastrnn.RHN(I, 256, depth=20, **k),
    "bnlstm": lambda **k: fastrnn.BNLSTM(I, H, max_length=T, **k),
    "bnlstm-both": lambda **k: fastrnn.BNLSTM(I, H, max_length=T, bidirectional=True, **k),
}
for _mode in ("update", "cell", "state"):
    for _per in ("step", "sequence"):
        _options = {
            "recurrent_dropout": 0.25,
            "recurrent_dropout_mode": _mode,
            "recurrent_dropout_per": _per,
        }
        MODULES[f"lstm-{_mode}-{_per}"] = lambda o=_options, **k: fastrnn.LSTM(I, H, **o, **k)
        if _mode != "cell":
            MODULES[f"gru-{_mode}-{_per}"] = lambda o=_options, **k: fastrnn.GRU(I, H, **o, **k)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CALLS = ("plain", "lengths", "reset")


def _mask_on_host(like: Tensor, p: float, *shape: int) -> Tensor | None:
    """A highway layer's mask: a GPU's generator draws others from the same seed."""
    if not p:
        return None
    return nn.functional.dropout(torch.ones(shape, dtype=like.dtype), p, True).to(like.device)


def run(module: nn.Module, x: Tensor, call: str, backend: str) -> dict[str, Tensor]:
    """Outputs and gradients; the masks are those of one seed."""
    torch.manual_seed(7)
    options: dict[str, Any] = {}
    if call == "lengths":
        options["lengths"] = torch.tensor([T, 2, 4, 1, T], device=x.device)
    elif call == "reset":
        options["reset"] = (torch.arange(T * N) % 4 == 3).view(T, N).to(x.device)
    given = x.clone().requires_grad_()
    # The function of that name stands before the module.
    highway = patch.object(sys.modules["fastrnn.functional.rhn"], "_mask", _mask_on_host)
    with highway, fastrnn.use_backend(backend):
        y, state = module(given, **options)
        parts = state if isinstance(state, tuple) else (state,)
        weights = torch.linspace(-1, 1, y.numel(), device=x.device).view_as(y).to(y.dtype)
        loss = (y * weights).sum() + sum(part.sum() for part in parts)
        leaves = {"x": given, **dict(module.named_parameters())}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    out = {"y": y.detach()} | {f"state {i}": part.detach() for i, part in enumerate(parts)}
    gradients = zip(leaves, found, strict=True)
    return out | {f"gradient of {name}": g for name, g in gradients if g is not None}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, dtype: torch.dtype, call: str) -> None:
    check_module("cuda", name, dtype, call)


def check_module(
    backend: str, name: str, dtype: torch.dtype, call: str, where: str = "cuda"
) -> None:
    """One call of one module on a backend; skips with the backend's own reason where it refuses."""
    torch.manual_seed(3)
    module = MODULES[name]().to(dtype)
    exact = MODULES[name]().double()
    exact.load_state_dict(module.state_dict())
    start = {key: value.clone() for key, value in module.state_dict().items()}
    x = torch.randn(T, N, I).to(dtype)
    number_format = "tf32" if dtype == torch.float32 and where == "cuda" else ""
    # torch's own products stay whole: the recurrent ones have the format.
    with multiplied_as("tf32" if number_format else "bf16"):
        there = MODULES[name](device=where, dtype=dtype)
        there.load_state_dict(start)
        try:
            got = run(there, x.to(where), call, backend)
        except RuntimeError as error:
            if "cannot serve this call" not in str(error):
                raise
            pytest.skip(str(error).partition("cannot serve this call: ")[2][:200])
        settle(where)
    truth = run(exact, x.double(), call, "reference")
    same = run(module, x, call, "reference")
    assert got.keys() == truth.keys()
    for key, value in got.items():
        assert_close_by_rule(
            f"{key} of {name}", value.cpu(), truth[key], same[key], dtype, number_format
        )
