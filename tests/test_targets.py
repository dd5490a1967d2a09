"""Speed targets one by one: which case and which contestant each takes, and that red is no pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
from benchmarks import report, targets
from benchmarks.cases import Case
from benchmarks.schema import Record, Results
from benchmarks.timing import Timing


def record(case: Case, ok: bool = True, **seconds: float) -> Record:
    times = {name: Timing(s, s, s, 9) for name, s in seconds.items()}
    return Record(case, {"fastrnn": {"ok": ok}}, times)


# Text, case, seconds of each contestant, the number, and what a red record makes of it.
RATED: list[tuple[str, Case, dict[str, float], float, float]] = [
    ("BN-LSTM training: time of our plain LSTM", Case("bnlstm", "training", 9, 8, 7, "loops"),
     {"fastrnn": 3.0, "fastrnn-plain": 2.0}, 1.5, float("inf")),
    ("LSTM with a regulariser, training", Case("lstm", "training", 9, 8, 7, "regularised"),
     {"fastrnn": 3.0, "fastrnn-plain": 2.0}, 1.5, float("inf")),
    ("RHN training, every case", Case("rhn", "training", 9, 8, 7, "loops"),
     {"fastrnn": 1.0, "loop": 4.0, "loop-compiled": 2.0}, 2.0, 0.0),
    ("bf16 weights, N<=4 H>=512", Case("lstm", "forward", 9, 4, 512, "bf16"),
     {"fastrnn": 3.0, "fastrnn-bf16": 2.0}, 1.5, 0.0),
    ("bf16 weights, N>=8", Case("lstm", "forward", 9, 8, 512, "bf16"),
     {"fastrnn": 3.0, "fastrnn-bf16": 2.0}, 1.5, 0.0),
    ("AVX2 against the widest instruction set: speed", Case("lstm", "forward", 9, 8, 512, "isa"),
     {"fastrnn@auto": 3.0, "fastrnn@avx2": 4.0}, 0.75, 0.0),
    ("one call, T=1 N=1 H=16, forward, eager", Case("lstm", "forward", 1, 1, 16, "overhead"),
     {"fastrnn": 1.0, "torch": 2.0}, 2.0, 0.0),
    ("LSTM forward, N>=8: against the faster peer", Case("lstm", "forward", 9, 8, 7),
     {"fastrnn": 1.0, "torch": 3.0, "onnx": 2.0}, 2.0, 0.0),
    ("GRU forward, geometric mean", Case("gru", "forward", 9, 8, 7),
     {"fastrnn": 1.0, "torch": 2.0}, 2.0, 4.5e-5),
]  # fmt: skip


@pytest.mark.parametrize("text, case, seconds, value, red", RATED, ids=[r[0] for r in RATED])
def test_a_target(
    text: str, case: Case, seconds: dict[str, float], value: float, red: float
) -> None:
    records = [record(case, **seconds)]
    if case.group == "overhead":  # compiled calls have a target of their own
        slower = {name: 9 * s for name, s in seconds.items() if name != "fastrnn"}
        records.append(record(replace(case, option="compiled"), **seconds | slower))

    def found() -> float | None:
        outcomes = targets.evaluate(Results({}, {}, None, records))
        (outcome,) = [each for each in outcomes if each.text.startswith(text)]
        return outcome.value

    assert found() == pytest.approx(value)
    records.insert(0, record(case, ok=False, **seconds))
    assert found() == pytest.approx(red, rel=0.01)


def test_a_shape_handed_over_counts_as_one_among_all_shapes() -> None:
    """It runs torch.nn's own kernel; what was measured of it stays in the report."""

    def goal() -> targets.Outcome:
        outcomes = targets.evaluate(Results({}, {}, None, records))
        return next(each for each in outcomes if each.text.startswith("every grid shape"))

    lstm, gru = (Case(cell, "forward", 9, 8, 7) for cell in ("lstm", "gru"))
    handed = record(lstm, fastrnn=1.0, torch=0.9)
    handed.backends["fastrnn"] = "torch"
    records = [handed, record(gru, fastrnn=1.0, torch=0.97)]
    assert (goal().value, goal().status, goal().where) == (0.97, "pass", gru.id)
    note = f"torch's kernel runs in 1 and counts as 1.00, measured 0.90 at worst in {lstm.id}"
    assert goal().note == note
    assert f"{gru.id}; {note}" in report.targets(Results({}, {}, None, records))
    records[1] = record(gru, fastrnn=1.0, torch=0.9)  # a kernel of ours
    assert (goal().value, goal().status) == (0.9, "MISS")
    handed.checks["fastrnn"]["ok"] = False
    assert (goal().value, goal().where, goal().note) == (0.0, lstm.id, "")
