"""A GPU that is made up: problems, times and kernels of the tests of who serves a call there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastrnn import backends
from fastrnn.backends import Problem
from fastrnn.backends.cuda_native import Plan
from fastrnn.gpu import choice, times, trial

H200 = times.Device("NVIDIA H200", 132)
STEP = {"us": 1.0}


def problem(**changes: object) -> Problem:
    usual = Problem("lstm", "cuda", torch.bfloat16, False, 128, 16, 512, 512, 0, 1, 1)
    return usual._replace(**changes)  # type: ignore[arg-type]


def plans(p: Problem) -> list[Plan]:
    return [Plan("", "", "sentinel", (), 8, 1, 32, 1, STEP["us"]) for _ in range(2)]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU on which the CUDA kernels take everything, at STEP["us"], and Triton's nothing; trials
    have their tensors on the CPU."""
    monkeypatch.setitem(backends.SERVES, "cuda", lambda p: "")
    monkeypatch.setitem(backends.SERVES, "triton", lambda p: "not in this test")
    monkeypatch.setattr(times, "cuda_plans", plans)
    monkeypatch.setattr(trial, "cuda_plans", plans)
    monkeypatch.setattr(times, "device", lambda ordinal: H200)
    monkeypatch.setattr(choice, "where", lambda ordinal: torch.device("cpu"))
    monkeypatch.setitem(STEP, "us", 1.0)
    choice.forget()
    yield
    choice.forget()


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A copy of the library's data that a test may change."""
    data = copy.deepcopy(times.table().data)
    monkeypatch.setattr(times, "_table", [times.Table(data)])
    return data


Kernel = Callable[["trial._Layer"], dict[str, torch.Tensor]]


def right(layer: trial._Layer) -> dict[str, torch.Tensor]:
    return layer.truth(layer.dtype)


def wrong(layer: trial._Layer) -> dict[str, torch.Tensor]:
    """One gradient of many is half too large."""
    found = layer.truth(layer.dtype)
    found["the gradient of weight 1"] *= 1.5
    return found


def raising(layer: trial._Layer) -> dict[str, torch.Tensor]:
    raise RuntimeError("an illegal instruction")


def kernel(monkeypatch: pytest.MonkeyPatch, run: Kernel) -> list[tuple[str, str]]:
    """Plants what the kernels compute; returns the list of their runs."""
    ran: list[tuple[str, str]] = []

    def instead(self: trial._Layer, *named: str) -> dict[str, torch.Tensor]:
        ran.append(named)  # type: ignore[arg-type]
        return run(self)

    monkeypatch.setattr(trial._Layer, "run", instead)
    return ran


def row(**changes: object) -> dict[str, Any]:
    usual = {
        "cell": "lstm", "format": "bfloat16", "training": False, "directions": 1, "packed": False,
        "depth": 1, "T": 1024, "N": 16, "H": 512, "us": {"cuda": 0.9, "torch": 1.2},
        "call": {"cuda": 100.0, "torch": 50.0},
    }  # fmt: skip
    return usual | changes


def measured(data: dict[str, Any], *rows: dict[str, Any], **more: Any) -> None:
    entry = {"name": "NVIDIA H200", "sms": 132, "source": "a campaign", "verified": []}
    data["devices"].append(entry | {"rows": list(rows)} | more)
