"""What a training step on the CPU holds beside its results: no copies of large weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn.backends import cpu, cpu_rhn


def workspace(module: torch.nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of scratch that the backward of a training step asks for."""
    known: dict[tuple[object, ...], int] = {}
    monkeypatch.setattr(cpu, "_backward_bytes", known)
    with fastrnn.use_backend("cpu"):
        module(x.requires_grad_())[0].sum().backward()
    [size] = known.values()
    return size


@pytest.mark.parametrize("kind", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
@pytest.mark.parametrize(("steps", "rows", "copies"), [(100, 2, 1.0), (12, 64, 1.5)])
def test_a_backward_packs_no_copy_of_all_weights(
    kind: type[torch.nn.Module],
    steps: int,
    rows: int,
    copies: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One chunk of steps packs them where their gradients will be. Several keep weight_hh packed
    and pack weight_ih a few columns at a time; the rest is what the rows of a chunk need."""
    units = 512 if copies == 1.0 else 1024
    module = kind(units, units)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    size = workspace(module, torch.randn(steps, rows, units), monkeypatch)
    assert size < copies * weights


@pytest.mark.parametrize(("steps", "rows", "copies"), [(20, 2, 0.5), (26, 20, 1.4)])
def test_a_highway_backward_packs_no_copy_of_all_weights(
    steps: int, rows: int, copies: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several hundred rows are one chunk as well, where that takes less than a packed copy."""
    sizes = []
    library = cpu_rhn._library()

    class Library:
        def __getattr__(self, name: str) -> object:
            return getattr(library, name)

        def rhn_backward_workspace(self, *fields: tuple[object, ...]) -> int:
            sizes.append(library.rhn_backward_workspace(*fields))
            return int(sizes[-1])

    monkeypatch.setattr(cpu_rhn, "_library", Library)
    module = fastrnn.RHN(640, 640, depth=5)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    with fastrnn.use_backend("cpu"):
        module(torch.randn(steps, rows, 640).requires_grad_())[0].sum().backward()
    assert len(sizes) == 1
    assert sizes[0] < copies * weights
