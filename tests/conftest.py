"""Fixtures every test runs under: fixed seeds, poisoned allocations, thread counts put back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch


def pytest_configure() -> None:
    """Workers that run side by side share the cores; tests that are about threads set their own."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest come first: at the end, the other workers would wait for them."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    # torch.manual_seed is slow where no GPU can be: it keeps the stack for a first use to come.
    set_seed = torch.default_generator.manual_seed
    if torch.backends.cuda.is_built():
        set_seed = torch.manual_seed
    set_seed(20240229)


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    """Fill what torch.empty, empty_like and new_empty return with NaN (integers: the maximum).

    torch's own deterministic mode does it below Python, so it holds under torch.compile too. A
    kernel that reads what it never wrote, or leaves an output unwritten, shows up as NaN.
    """
    # Set this way the mode is the same, and a process that compiles nothing imports no compiler.
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(autouse=True)
def _fresh_dynamo(request: pytest.FixtureRequest) -> None:
    """What earlier tests compiled counts against dynamo's limit of recompilations: it keeps by code
    object, and all modules share that of one `forward`."""
    if request.node.get_closest_marker("compile"):
        torch._dynamo.reset()


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads for one test; the old count is put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2, 3, 4], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest, set_threads: Callable[[int], None]) -> int:
    """Run the test once for each thread count."""
    count: int = request.param
    set_threads(count)
    return count
