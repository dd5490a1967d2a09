"""What users do between calls, in any order: each call gives what torch.nn gives.

From the second call of a shape on modules go prepared ways with packed weights, which have to
notice whatever would change torch.nn's results. Modules of both live through the same, drawn by
hypothesis. FASTRNN_HYPOTHESIS_CASES widens it (tests/drawn.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

from tests.drawn import drawn
from tests.quartet import LAYERS, H, Quartet
from tests.stateful_calls import BOOLS
from tests.stateful_changes import CHANGES, Changes, each_after_prepared_calls

# torch's own, of what its LSTM does not hand on.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


class Machine(Changes):
    """LSTM, GRU, RNN and their cells."""

    kinds = (*LAYERS, *LAYERS, "LSTMCell", "GRUCell", "RNNCell")

    @initialize(
        kind=st.sampled_from(kinds), relu=BOOLS, bias=BOOLS, layers=st.sampled_from([1, 1, 2]),
        directions=st.sampled_from([1, 1, 2]), batch_first=BOOLS, projected=BOOLS,
        small_memory=BOOLS, looks=st.sampled_from(["infer", "infer", "train", "step"]),
        seed=st.integers(0, 2**20),
    )  # fmt: skip
    def begin(
        self, kind: str, relu: bool, bias: bool, layers: int, directions: int, batch_first: bool,
        projected: bool, small_memory: bool, looks: str, seed: int,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        kept: dict[str, Any] = {"bias": bias}
        if kind in LAYERS:
            kept |= {"num_layers": layers, "bidirectional": directions == 2}
            kept["batch_first"] = batch_first
        if kind == "LSTM" and projected:
            kept["proj_size"] = 3
        q = Quartet.of_torch(kind, relu, kept)
        self.start(q, small_memory, looks, layers * directions)
        self.out = kept.get("proj_size", H)


@pytest.mark.first
def test_any_order_of_calls_and_changes() -> None:
    run_state_machine_as_test(Machine, settings=drawn(12, stateful_step_count=24))


@pytest.mark.parametrize(
    "kind, looks",
    [("LSTM", "train"), ("LSTM", "step"), ("GRU", "infer"), ("GRU", "train"), ("RNNCell", "infer")],
)
def test_a_change_after_prepared_calls(kind: str, looks: str) -> None:
    def begin() -> Machine:
        m = Machine()
        m.begin(kind, False, True, 1, 1, False, False, False, looks, 3)
        return m

    each_after_prepared_calls(begin, CHANGES)
