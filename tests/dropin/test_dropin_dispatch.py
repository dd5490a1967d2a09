"""use_backend, FASTRNN_BACKEND and explain(): what runs, by whose wish, and what could not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from dropin_cases import (
    Kind,
    assert_same_bits,
    compare,
    outcome,
    raised,
    random_packed,
    random_state,
    results,
    twins,
)
from torch import nn

import fastrnn

X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(4))
NAMES = ("cpu", "cuda", "triton", "torch", "reference")


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_backends_agree(any_kind: Kind, backend: str) -> None:
    ours, theirs = twins(any_kind, 5, 7, num_layers=2, bidirectional=True)
    for x in (X, random_packed(5, [4, 2, 1])):
        with fastrnn.use_backend(backend):
            assert fastrnn.explain(ours, x).backend == backend
            compare(ours, theirs, results, x)
            compare(ours, theirs, outcome, x)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_backends_agree_on_cells(cell: Kind, backend: str) -> None:
    ours, theirs = twins(cell, 5, 7)
    with fastrnn.use_backend(backend):
        compare(ours, theirs, results, X[0])
        compare(ours, theirs, outcome, X[0])


@pytest.mark.parametrize("name", ["nope", "CPU", "", None, 3])
def test_unknown_backend(name: Any) -> None:
    ours, _ = twins(Kind("lstm", "LSTM"), 5, 7)
    before = outcome(ours, X)
    error, text = raised(lambda: fastrnn.use_backend(name).__enter__())
    assert error is ValueError
    assert repr(name) in text
    assert all(backend in text for backend in NAMES)
    assert_same_bits(outcome(ours, X), before)
    assert fastrnn.explain(ours, X).backend == "cpu"


def test_strict_raises_where_the_backend_cannot_serve(kind: Kind) -> None:
    ours, _ = twins(kind, 5, 7)
    before = outcome(ours, X)
    for backend in ("cuda", "triton"):
        with fastrnn.use_backend(backend):
            for call in (lambda: ours(X), lambda: fastrnn.explain(ours, X)):
                error, text = raised(call)
                assert error is RuntimeError
                assert f"use_backend('{backend}')" in text
                assert "strict=False" in text
    assert_same_bits(outcome(ours, X), before)


def test_not_strict_goes_on_and_takes_note(kind: Kind) -> None:
    ours, _ = twins(kind, 5, 7)
    before = results(ours, X)
    with fastrnn.use_backend("cuda", strict=False) as override:
        assert_same_bits(results(ours, X), before)
        found = fastrnn.explain(ours, X)
    assert found.backend == "cpu"
    assert found.rejected[0][0] == "cuda"
    asked, ran, reason = override.fallbacks[0]
    assert (asked, ran) == ("cuda", "cpu")
    assert reason
    assert "cuda" in str(found)


def test_options_that_torch_lacks_are_refused_in_strict_mode() -> None:
    ours, _ = twins(Kind("lstm", "LSTM"), 5, 7)
    reset = torch.zeros(4, 3, dtype=torch.bool)
    with fastrnn.use_backend("torch"):
        assert raised(lambda: ours(X, reset=reset))[0] is RuntimeError
    with fastrnn.use_backend("torch", strict=False) as override:
        ours(X, reset=reset)
    assert override.fallbacks


def test_blocks_nest_and_end_after_an_exception(kind: Kind) -> None:
    ours, _ = twins(kind, 5, 7)
    with fastrnn.use_backend("reference"):
        with fastrnn.use_backend("torch"):
            assert fastrnn.explain(ours, X).backend == "torch"
        assert fastrnn.explain(ours, X).backend == "reference"
        with pytest.raises(KeyError), fastrnn.use_backend("torch"):
            raise KeyError
        assert fastrnn.explain(ours, X).backend == "reference"
    assert fastrnn.explain(ours, X).backend == "cpu"


def test_other_threads_are_not_affected() -> None:
    ours, _ = twins(Kind("lstm", "LSTM"), 5, 7)
    seen: list[str] = []
    with fastrnn.use_backend("reference"):
        worker = threading.Thread(target=lambda: seen.append(fastrnn.explain(ours, X).backend))
        worker.start()
        worker.join()
    assert seen == ["cpu"]


PROBE = """
import torch, fastrnn
m = fastrnn.GRU(3, 4)
x = torch.randn(2, 2, 3)
print(fastrnn.explain(m, x).backend)
m(x)
"""


Probes = dict[str, tuple[int, str, str]]


@pytest.fixture(scope="module")
def probes() -> Probes:
    """Exit status, output and errors of the probe under three values of the variable."""

    def start(backend: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "FASTRNN_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", PROBE]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    started = {backend: start(backend) for backend in ("reference", "cuda", "gpu")}
    texts = {backend: process.communicate(timeout=200) for backend, process in started.items()}
    return {backend: (started[backend].returncode, *text) for backend, text in texts.items()}


def test_environment_variable_chooses_and_announces_itself(probes: Probes) -> None:
    status, output, errors = probes["reference"]
    assert status == 0, errors
    assert output.strip() == "reference"
    assert "FASTRNN_BACKEND=reference" in errors


def test_environment_variable_is_strict(probes: Probes) -> None:
    status, _, errors = probes["cuda"]
    assert status != 0
    assert "FASTRNN_BACKEND" in errors.splitlines()[-1]


def test_environment_variable_with_a_wrong_name(probes: Probes) -> None:
    status, _, errors = probes["gpu"]
    assert status != 0
    last = errors.splitlines()[-1]
    assert last.startswith("ValueError: FASTRNN_BACKEND: got 'gpu', expected one of 'cpu'")
    assert all(name in last for name in NAMES)


def test_explanation_text(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 5, 7, num_layers=2)
    found = fastrnn.explain(ours, X, random_state(ours, 3))
    assert found.backend == "cpu"
    assert found.plan
    assert found.reason
    assert found.rejected == []
    text = str(found)
    for line in (f"backend: {found.backend}", f"plan: {found.plan}", f"reason: {found.reason}"):
        assert line in text


def test_explain_computes_nothing(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 5, 7, num_layers=2, dropout=0.5)
    rng = torch.get_rng_state()
    attributes = dict(ours.__dict__)
    fastrnn.explain(ours, X)
    assert torch.equal(torch.get_rng_state(), rng)
    assert set(ours.__dict__) == set(attributes)


def test_explain_takes_every_input(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 5, 7)
    reset = torch.zeros(4, 3, dtype=torch.bool)
    explanations = [
        fastrnn.explain(ours, X),
        fastrnn.explain(ours, X[:, 0]),
        fastrnn.explain(ours, random_packed(5, [4, 2])),
        fastrnn.explain(ours, X, lengths=[4, 2, 1]),
        fastrnn.explain(ours, X, reset=reset),
        fastrnn.explain(ours.double(), X.double()),
    ]
    assert all(found.backend in NAMES for found in explanations)


def test_explain_float16_names_what_was_rejected(kind: Kind) -> None:
    ours = kind.ours(5, 7, dtype=torch.float16)
    found = fastrnn.explain(ours, X.half())
    assert dict(found.rejected)["cpu"]
    for name, why in found.rejected:
        assert f"rejected: {name}: {why}" in str(found)


def test_explain_cells_and_torch_modules(cell: Kind) -> None:
    ours, theirs = twins(cell, 5, 7)
    with torch.no_grad():  # a step with gradients may be handed to torch, see fastrnn.handover
        assert fastrnn.explain(ours, X[0]).backend == "cpu"
    found = fastrnn.explain(theirs, X[0])
    assert found.backend == "torch"
    assert "fastrnn.replace" in found.reason


def test_explain_refuses_other_things() -> None:
    error, text = raised(lambda: fastrnn.explain(nn.Linear(5, 7), X))
    assert error is TypeError
    assert "Linear" in text
    ours, _ = twins(Kind("lstm", "LSTM"), 5, 7)
    assert raised(lambda: fastrnn.explain(ours, X, lengths=[9, 1, 1]))[0] is ValueError
