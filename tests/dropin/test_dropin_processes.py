"""Threads and processes: concurrent callers, fork, spawn, data loader workers, thread counts."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from dropin_cases import KINDS, LIBRARY, Kind, assert_same_bits, outcome, results, twins
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# Large enough that a thread team is worth it, small enough for milliseconds.
SIZES = (48, 64)
X = torch.randn(12, 16, 48, generator=torch.Generator().manual_seed(4))
LIMIT = 60


@pytest.fixture
def thread_count() -> int:
    return 2


def module_of(kind: Kind) -> Any:
    return twins(kind, *SIZES, num_layers=2, bidirectional=True)[0]


def as_numpy(found: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in found.items()}


def child(module: Any, connection: Any) -> None:
    """Forward and backward in a child process; plain arrays travel back."""
    # The poisoning of allocations is torch's own work on several threads, which no fork survives.
    torch.use_deterministic_algorithms(False)
    connection.send_bytes(pickle.dumps(as_numpy(outcome(module, X))))


def grandchild(module: Any, connection: Any) -> None:
    """Compute, then fork again and let the next generation compute and answer."""
    torch.use_deterministic_algorithms(False)
    outcome(module, X)
    run_in_process("fork", child, module, connection)


def run_in_process(method: str, target: Any, module: Any, connection: Any) -> int:
    process = multiprocessing.get_context(method).Process(target=target, args=(module, connection))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"{method}: the child did not finish within {LIMIT} s")
    return process.exitcode or 0


def answer_of(method: str, target: Any, module: Any) -> dict[str, Tensor]:
    receiver, sender = multiprocessing.get_context(method).Pipe(duplex=False)
    reader: list[bytes] = []
    thread = threading.Thread(target=lambda: reader.append(receiver.recv_bytes()), daemon=True)
    thread.start()
    assert run_in_process(method, target, module, sender) == 0
    thread.join(LIMIT)
    return {name: torch.from_numpy(value) for name, value in pickle.loads(reader[0]).items()}


@pytest.mark.parametrize("target", [child, grandchild])
def test_forked_child_after_the_parent_computed(kind: Kind, target: Any) -> None:
    module = module_of(kind)
    expected = outcome(module, X)
    assert_same_bits(answer_of("fork", target, module), expected)
    assert_same_bits(outcome(module, X), expected)


def test_many_forks(kind: Kind) -> None:
    module = module_of(kind)
    for _ in range(5):
        expected = outcome(module, X)
        assert_same_bits(answer_of("fork", child, module), expected)


def test_spawned_child() -> None:
    """A module travels to a fresh interpreter and gives the same bits there."""
    module = module_of(KINDS[0])
    assert_same_bits(answer_of("spawn", child, module), outcome(module, X))


def double_in_place(module: Any, connection: Any) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)


def test_weights_in_shared_memory(kind: Kind) -> None:
    """A child trains on the parent's memory, as in Hogwild: the parent sees the new weights."""
    module = module_of(kind).share_memory()
    results(module, X)
    doubled = kind.ours(*SIZES, num_layers=2, bidirectional=True)
    doubled.load_state_dict({k: v * 2 for k, v in module.state_dict().items()})
    assert run_in_process("fork", double_in_place, module, None) == 0
    assert_same_bits(results(module, X), results(doubled, X))
    assert_same_bits(outcome(module, X), outcome(doubled, X))


class Encoded(Dataset):
    """Runs a recurrent module, forward and backward, inside the worker."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        found = outcome(self.module, X + index)
        return torch.stack([found["out[0]"].sum(), found["dweight_hh_l0"].sum()])


def test_data_loader_workers(kind: Kind) -> None:
    data = Encoded(module_of(kind))
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(
        data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=LIMIT
    )
    # A worker runs on one thread, so only the order of a few sums may differ.
    torch.testing.assert_close(torch.cat(list(loader)), expected)


@pytest.mark.parametrize("shared", [True, False], ids=["one_module", "own_modules"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "inference"])
def test_concurrent_callers(kind: Kind, shared: bool, training: bool) -> None:
    """Four Python threads at once get what each gets alone."""
    module = module_of(kind)
    modules = [module] * 4 if shared else [module_of(kind) for _ in range(4)]
    inputs = [X + i for i in range(4)]

    def run(i: int) -> dict[str, Tensor]:
        if not training:
            return results(modules[i], inputs[i])
        x = inputs[i].clone().requires_grad_()
        output, _ = modules[i](x)
        wanted = [x, modules[i].weight_hh_l0, modules[i].weight_ih_l1]
        found = torch.autograd.grad(output.square().sum(), wanted)
        return {"output": output.detach(), **{f"grad[{k}]": g for k, g in enumerate(found)}}

    alone = [run(i) for i in range(4)]
    together: list[list[dict[str, Tensor]]] = [[] for _ in range(4)]
    gate = threading.Barrier(4)

    def work(i: int) -> None:
        gate.wait(LIMIT)
        for _ in range(8):
            together[i].append(run(i))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(LIMIT)
        assert not worker.is_alive()
    for i, rounds in enumerate(together):
        assert len(rounds) == 8
        for found in rounds:
            assert_same_bits(found, alone[i])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_thread_count(kind: Kind, count: int, set_threads: Any) -> None:
    """More threads than cores included; the forward pass has the same bits with any number."""
    module = module_of(kind)
    set_threads(1)
    expected = results(module, X)
    set_threads(count)
    for name, value in results(module, X).items():
        torch.testing.assert_close(value, expected[name])
    first = outcome(module, X)
    assert_same_bits(first, outcome(module, X))


THREADS_PROBE = """
import os, sys, torch
from importlib import import_module
module = import_module(sys.argv[1]).LSTM(256, 256, 2)
x = torch.randn(20, 16, 256)
for count in (1, 2):
    torch.set_num_threads(count)
    module(x)[0].sum().backward()
    with torch.no_grad():
        module(x)
    print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads through /proc")
def test_set_num_threads_is_respected() -> None:
    """A second thread for torch means one more of ours at most, beside torch's own."""
    command = [sys.executable, "-c", THREADS_PROBE, LIBRARY.__name__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "4"}
    counts = subprocess.check_output(command, env=environment, text=True, timeout=3 * LIMIT)
    one, two = (int(line) for line in counts.split())
    assert one < two <= one + 2
