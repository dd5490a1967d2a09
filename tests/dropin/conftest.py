"""Fixtures of the drop-in tests."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from dropin_cases import CELLS, KINDS, LIBRARY, PROJECTED, Kind

# These ask for more than torch.nn gives, so torch.nn cannot stand in for the library.
collect_ignore = (
    [
        "test_dropin_beyond.py",
        "test_dropin_dispatch.py",
        "test_dropin_options.py",
        "test_dropin_repeated.py",
        "test_dropin_step.py",
        "test_dropin_surgery.py",
        "test_dropin_transforms.py",
    ]
    if LIBRARY is torch.nn
    else []
)


@pytest.fixture
def thread_count() -> int:
    """Threads for the tests of a file; one: the shapes are small and torch.nn's workers spin."""
    return 1


@pytest.fixture(autouse=True)
def threads_of_the_file(thread_count: int, set_threads: Callable[[int], None]) -> None:
    set_threads(thread_count)


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Silence torch's remarks about its own slow path and its own older weight_norm."""
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported")
    warnings.filterwarnings("ignore", message=".*weight_norm.* is deprecated")


@pytest.fixture(params=KINDS, ids=lambda kind: kind.id)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(params=[*KINDS, PROJECTED], ids=lambda kind: kind.id)
def any_kind(request: pytest.FixtureRequest) -> Kind:
    """Like `kind`, with the projected LSTM."""
    return request.param


@pytest.fixture(params=CELLS, ids=lambda kind: kind.id)
def cell(request: pytest.FixtureRequest) -> Kind:
    return request.param
