"""Memory that the process keeps for large tapes, scratch and gradients."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn.backends import cpu
from fastrnn.backends.cpu_memory import KEPT, LARGE, kept, kept_like, output

pytestmark = pytest.mark.skipif(not cpu.LOADED, reason="the native library is not built")
MIB = 1 << 20


def figures() -> tuple[int, int, int]:
    """Bytes in use, idle bytes, and how many may be."""
    return cpu._cpu.kept_memory()


@pytest.fixture(autouse=True)
def limit() -> Iterator[int]:
    before = figures()[2]
    cpu._cpu.keep_memory(0)  # nothing of other tests lies idle
    cpu._cpu.keep_memory(256 * MIB)
    yield 256 * MIB
    cpu._cpu.keep_memory(before)


def floats(mib: float) -> Tensor:
    return kept((int(mib * MIB) // 4,), torch.float32)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_a_tensor_is_like_torchs(dtype: torch.dtype) -> None:
    shape = (3, LARGE // 2, 1)
    tensor = kept(shape, dtype)
    like = torch.empty(shape, dtype=dtype)
    assert tensor.shape == like.shape
    assert tensor.stride() == like.stride()
    assert tensor.dtype == dtype
    assert tensor.device == like.device
    assert not tensor.requires_grad
    assert tensor.data_ptr() % 64 == 0
    tensor.fill_(3)
    assert tensor.sum(dtype=torch.float64).item() == 3 * tensor.numel()


def test_small_ones_and_outputs_are_torchs() -> None:
    used = figures()[0]
    small, large = kept((KEPT // 4 - 1,), torch.float32), output((LARGE,), torch.float32)
    assert figures()[0] == used
    small.resize_(2 * LARGE)
    large.resize_(2 * LARGE)


def test_results_of_inference_can_be_resized() -> None:
    x = torch.randn(100, 64, 32)
    with torch.no_grad():
        results = fastrnn.LSTM(32, 64)(x, return_cells=True)
        bn = fastrnn.BNLSTM(32, 64, max_length=100).eval()(x, return_cells=True)
    for tensor in (results[0], results[2], bn[0], bn[2]):
        assert tensor.nbytes > KEPT
        tensor.resize_(2 * tensor.numel())


def test_like() -> None:
    used = figures()[0]
    dense = torch.empty(LARGE // 4, 2)
    like = kept_like(dense)
    assert like.shape == dense.shape
    assert figures()[0] > used
    turned = kept_like(dense.t())  # in the order of its axes: torch's
    assert turned.stride() == torch.empty_like(dense.t()).stride()
    assert kept_like(torch.empty(LARGE, dtype=torch.int32)).dtype == torch.int32


def test_what_is_given_back_comes_again() -> None:
    used = figures()[0]
    first, second = floats(8), floats(16)
    places = first.data_ptr(), second.data_ptr()
    assert figures()[0] - used == 24 * MIB
    del first, second
    assert figures()[:2] == (used, 24 * MIB)
    first, second = floats(8), floats(16)
    assert (first.data_ptr(), second.data_ptr()) == places
    assert figures()[1] == 0


def test_live_tensors_never_share_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    live: list[tuple[Tensor, int]] = []
    for turn in range(200):
        if live and torch.rand((), generator=generator) < 0.5:
            tensor, value = live.pop(int(torch.randint(len(live), (), generator=generator)))
            assert bool((tensor == value).all())
        else:
            tensor = floats(4 + 8 * float(torch.rand((), generator=generator)))
            live.append((tensor.fill_(turn), turn))
        if len(live) > 12:
            live.pop(0)
    for tensor, value in live:
        assert bool((tensor == value).all())


def test_no_more_than_was_in_use_at_once() -> None:
    """Sizes that do not fit into what lies idle: that goes back to the system first."""
    used = figures()[0]
    most = 40 * MIB
    for mib in (8, 10, 13, 20, 32, 40, 7, 33, 12, 40):
        tensor = floats(mib).fill_(1)
        in_use, idle, _ = figures()
        assert in_use - used + idle <= max(most, mib * MIB)
        del tensor


def test_the_limit_of_what_lies_idle(limit: int) -> None:
    before = resident()
    tensors = [floats(32).fill_(1) for _ in range(12)]
    assert resident() - before > 380 * MIB
    tensors.clear()
    assert figures()[1] == limit
    assert resident() - before < limit + 16 * MIB
    cpu._cpu.keep_memory(0)
    assert figures()[1] == 0
    assert resident() - before < 16 * MIB
    used = figures()[0]
    tensor = floats(8)  # nothing is kept now
    assert figures()[0] == used
    tensor.resize_(4 * LARGE)


def test_a_step_of_training_finds_its_memory_again() -> None:
    torch.manual_seed(0)
    lstm, x = fastrnn.LSTM(64, 128), torch.randn(300, 32, 64)

    def step() -> list[Tensor]:
        lstm.zero_grad()
        lstm(x)[0].square().sum().backward()
        return [p.grad.clone() for p in lstm.parameters() if p.grad is not None]

    gc.collect()  # what earlier tests left must not go, and leave room, between two steps
    used = figures()[0]
    first = step()
    step()  # from the third on a call is prepared, and asks in another order
    step()
    after = figures()
    for _ in range(3):
        again = step()
        assert figures() == after
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert after[0] == used  # weight gradients are small here
    assert after[1] > 20 * MIB


def test_saved_tensors_outlive_the_layer() -> None:
    used = figures()[0]
    y = fastrnn.LSTM(64, 128)(torch.randn(300, 32, 64))[0]
    assert figures()[0] > used
    y.sum().backward()
    del y
    assert figures()[0] == used


def test_many_threads() -> None:
    used = figures()[0]
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(20):
            value = 100 * number + turn
            tensor = floats(4 + number % 3).fill_(value)
            if not bool((tensor == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert figures()[0] == used


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_of_a_fork() -> None:
    before = floats(8)
    some = before[:1000].fill_(7)  # few: a child has no threads of OpenMP to share more with
    child = os.fork()
    if child == 0:
        mine = floats(8)[:1000].fill_(9)
        fine = bool((some == 7).all()) and bool((mine == 9).all())
        some.fill_(1)
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert bool((some == 7).all())


@pytest.mark.parametrize(
    ("value", "idle", "said"),
    [("0", 0, ""), ("7", 7 * MIB, ""), ("much", 512 * MIB, "FASTRNN_KEEP_MEMORY=much ignored")],
)
def test_the_variable(value: str, idle: int, said: str) -> None:
    code = "import fastrnn; from fastrnn.backends import cpu; print(cpu._cpu.kept_memory()[2])"
    environment = {**os.environ, "FASTRNN_KEEP_MEMORY": value}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) == idle
    assert said in ran.stderr


@pytest.mark.parametrize("kind", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_a_large_layer_is_prepared(kind: type[torch.nn.Module]) -> None:
    """From the second step of a shape on: the first one's bits, in memory that is kept."""
    layer = kind(24, 64)
    x = torch.randn(70, 32, 24, requires_grad=True)

    def step() -> list[Tensor]:
        used = figures()[0]
        y = layer(x)[0]
        assert figures()[0] >= used + y.nbytes > KEPT
        gradients = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))
        return [y.detach().clone(), *gradients]

    first = step()
    for _ in range(2):
        for t, expected in zip(step(), first, strict=True):
            assert torch.equal(t, expected)
    call = layer._packed.training._layer  # which holds no buffer between the calls
    assert all(t is None or t.is_meta for t in (call._y, call._cells, call._gates))
