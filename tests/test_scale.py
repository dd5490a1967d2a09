"""Training over two processes, with DDP and FSDP2, is training in one; gradient scaling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

import fastrnn
from tests.tolerances import assert_close_by_rule, assert_same_bits
from tests.versions import OLD

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)

STEPS, T, N, I, H = 10, 5, 4, 3, 6

CELLS: dict[str, Callable[..., nn.Module]] = {
    "lstm": fastrnn.LSTM,
    "lstm_layer_norm": lambda *a, **k: fastrnn.LSTM(*a, layer_norm=True, **k),
    "gru": fastrnn.GRU,
    "rnn": fastrnn.RNN,
    "rhn": lambda *a, **k: fastrnn.RHN(*a, depth=2, **k),
    "bnlstm": lambda *a, **k: fastrnn.BNLSTM(*a, max_length=T, eps=0.1, **k),
}


class Model(nn.Module):
    """A recurrent layer and a classifier on its last output."""

    def __init__(self, cell: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.rnn = CELLS[cell](I, H, 2, bidirectional=True, dtype=dtype)
        self.head = nn.Linear(2 * H, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][-1])


def build(cell: str, dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(3)
    return Model(cell, dtype)


def batches(dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        x = torch.randn(T, N, I, generator=draw).to(dtype)
        yield x, torch.randn(N, 2, generator=draw).to(dtype)


def train(model: nn.Module, rows: slice) -> None:
    """STEPS steps of SGD with momentum on these rows of every batch."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, target in batches():
        optimiser.zero_grad()
        (model(x[:, rows]) - target[rows]).square().mean().backward()
        optimiser.step()


def work(rank: int, folder: str, wrapper: str) -> None:
    """Every cell in one group of processes, which take longer to start than to train."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    trained = {}
    for cell in CELLS:
        model: Any = build(cell)
        if cell == "bnlstm":  # statistics over both halves of the batch
            model.rnn.process_group = distributed.group.WORLD
        if wrapper == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            fully_shard(model.rnn, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        half = N // 2
        train(wrapped, slice(rank * half, (rank + 1) * half))
        whole = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in _state(model).items()}
        trained[cell] = {k: v.detach().clone() for k, v in whole.items()}
    torch.save(trained, f"{folder}/{rank}.pt")
    del wrapped  # whose reducer would end the group with the GIL held
    distributed.barrier()
    distributed.destroy_process_group()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_are_one(wrapper: str, tmp_path: Path) -> None:
    if wrapper == "fsdp2":
        if OLD:
            pytest.skip("FSDP2 of torch 2.6 does not run on a CPU")
        pytest.importorskip("torch.distributed.fsdp")
    multiprocessing.spawn(work, (str(tmp_path), wrapper), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for cell in CELLS:
        model = build(cell)
        train(model, slice(None))
        for name, expected in _state(model).items():
            first, second = (part[cell][name] for part in parts)
            assert_same_bits(f"{name} of {cell}, the two ranks", first, second)
            assert_close_by_rule(f"{name} of {cell}", first, expected, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_scaling(cell: str) -> None:
    """Scaled by a power of two and back, gradients keep their bits; an overflow skips the step."""
    x, target = next(batches(torch.float32))
    plain, scaled = build(cell, torch.float32), build(cell, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimiser = torch.optim.SGD(scaled.parameters(), lr=0.1)
    (plain(x) - target).square().mean().backward()
    scaler.scale((scaled(x) - target).square().mean()).backward()
    scaler.unscale_(optimiser)
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert_same_bits(name, b.grad, a.grad)
    scaler.step(optimiser)
    scaler.update()
    before = [p.detach().clone() for p in scaled.parameters()]
    optimiser.zero_grad()
    scaler.scale((scaled(x) * torch.inf).sum()).backward()
    scaler.step(optimiser)
    scaler.update()
    for was, now in zip(before, scaled.parameters(), strict=True):
        assert_same_bits("a skipped step", now.detach(), was)
    assert scaler.get_scale() == 512.0
