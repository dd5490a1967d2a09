"""Ratios that README and docs/not-faster.md quote in words are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.cases import Case
from benchmarks.schema import RESULTS, Record, Results
from benchmarks.targets import vs_loop, vs_onnx, vs_plain, vs_torch

ROOT = Path(__file__).resolve().parent.parent
XEON, EPYC = "intel-xeon-family-6-model-167", "amd-epyc-family-25-model-1"
ZEN5 = "amd-epyc-family-26-model-2"
BOTH = ("README.md", "docs/not-faster.md")
PAGE = BOTH[1:]


def held(machine: str, name: str = "full") -> dict[str, Record]:
    records = Results.load(RESULTS / machine / f"{name}.json").records
    return {record.case.id: record for record in records}


def quoted(words: str, documents: tuple[str, ...] = BOTH) -> None:
    for name in documents:
        text = re.sub(r"\s+", " ", (ROOT / name).read_text().replace("*", ""))
        assert words in text, f"{name} lacks: {words}"


def beside_torch_and_onnx(grid: list[Record]) -> dict[str, float]:
    """Cases slower than ONNX Runtime, of a grid whose least speed beside torch.nn's is quoted."""
    assert not any(record.handed_over for record in grid)
    quoted(f"({min(vs_torch(r) or 0 for r in grid):.2f} times as fast at least)")
    return {r.case.id: ratio for r in grid if (ratio := vs_onnx(r)) is not None and ratio < 1}


def rate(case: Case) -> str:
    return f"{case.T} steps of {case.N} rows, H = {case.H}"


def test_batch_norm_against_loops() -> None:
    found = held(XEON)

    def loop(shape: str, disturbed: bool = False) -> str:
        record = found[f"bnlstm/training/{shape}/loops"]
        assert record.disturbed == disturbed, "not to be quoted, or only as disturbed"
        return f"{record.speedup('loop'):.1f}"

    quoted(
        f"{loop('T100-N128-H256')} times the eager loop with 128 rows at H = 256, "
        f"{loop('T50-N32-H100')} with 32 rows at H = 100"
    )
    quoted(
        f"({loop('T50-N64-H512', True)} times with 64 rows at H = 512; "
        f"{loop('T100-N32-H256', True)} and {loop('T784-N64-H100', True)})"
    )
    rows = {k: r for k, r in held(EPYC).items() if k.startswith("bnlstm/training/")}
    assert not any(record.disturbed for record in rows.values())
    ratios = {key: vs_loop(record) or 0 for key, record in rows.items()}
    assert min(ratios, key=ratios.__getitem__) == "bnlstm/training/T50-N64-H512/loops"
    middle = rows["bnlstm/training/T100-N32-H256/loops"]
    costs = [vs_plain(record) or 0 for record in rows.values()]
    quoted(
        f"{min(ratios.values()):.1f} (64 rows at H = 512) to {max(ratios.values()):.1f} times the "
        f"fastest loop, {vs_loop(middle):.1f} with 32 rows at H = 256. It costs "
        f"{min(costs):.2f} to {max(costs):.2f} times our plain LSTM; one as fast as that would "
        f"reach {(vs_loop(middle) or 0) * (vs_plain(middle) or 0):.1f} in the last of these",
        PAGE,
    )


def test_highway_network_with_avx2() -> None:
    rows = {k: r for k, r in held(EPYC).items() if k.startswith("rhn/training/")}
    deep, single, few = (
        rows.pop(f"rhn/training/{shape}/loops")
        for shape in ("T35-N20-H830-L10", "T100-N1-H512-L5", "T64-N8-H100-L2")
    )
    assert not any(r.disturbed for r in (deep, single, few, *rows.values()))
    ratios = sorted(vs_loop(record) or 0 for record in rows.values())
    quoted(
        f"{ratios[0]:.1f} to {ratios[-1]:.1f} times as fast as the fastest loop with 20 rows and "
        f"more, {vs_loop(few):.1f} with 8 rows at H = 100, and {vs_loop(single):.1f} with one row "
        f"at H = 512, depth 5, T = 100; {vs_loop(deep):.1f} at T = 35, N = 20, H = 830, depth 10",
        ("docs/cpu-kernels.md",),
    )


def test_large_layers() -> None:
    large = [
        (ratio, record.case)
        for record in held(XEON).values()
        if record.case.group == "grid" and record.case.H == 1024 and record.case.N >= 32
        if (ratio := vs_torch(record)) is not None and not record.disturbed
    ]
    (least, slow), (most, _) = min(large, key=lambda r: r[0]), max(large, key=lambda r: r[0])
    assert (slow.cell, slow.mode, slow.T, slow.N) == ("gru", "training", 25, 128)
    quoted(f"from {1 - least:.0%} behind torch.nn (GRU training, 25 steps of 128 rows) to "
           f"{most - 1:.0%} ahead")  # fmt: skip


def test_with_avx2() -> None:
    found = held(EPYC)
    grid = [record for record in found.values() if record.case.group == "grid"]
    behind = beside_torch_and_onnx(grid)
    seventeen, more, rnn = (
        behind.pop(case)
        for case in (
            "lstm/forward/T100-N17-H200", "lstm/forward/T100-N32-H256", "rnn/forward/T1-N1-H128",
        )
    )  # fmt: skip
    assert not behind
    quoted(
        f"LSTM inference of 17 rows at H = 200 ({seventeen:.2f}) and of 32 at H = 256 "
        f"({more:.2f}), and one call of an RNN at H = 128 ({rnn:.2f})"
    )
    eight, one = (
        vs_onnx(found[f"lstm/forward/{shape}"]) or 0 for shape in ("T100-N8-H256", "T1-N32-H512")
    )
    quoted(f"8 rows at H = 256, where this one has {eight:.2f}", PAGE)
    quoted(f"one step of 32 rows at H = 512 ({one:.2f})", PAGE)
    many = [r for r in grid if r.case.cell == "lstm" and r.case.N >= 8 and not r.disturbed]
    high, case = max(
        ((vs_onnx(r) or 0, r.case) for r in many if r.case.mode == "forward"), key=lambda r: r[0]
    )
    quoted(f"up to {high:.2f} times ({rate(case)}) its speed", PAGE)
    training = sorted(
        ((vs_torch(r) or 0, r.case) for r in many if r.case.mode == "training"), key=lambda r: r[0]
    )
    (low, case), (high, _) = training[0], training[-1]
    quoted(f"{low:.2f} ({rate(case)}) to {high:.1f} times as fast as torch.nn's", PAGE)


def test_small_calls_with_avx2() -> None:
    found = held(EPYC)
    rnn, gru, lstm = (
        [f"{vs_onnx(found[f'{cell}/forward/T1-N1-H{width}']):.2f}" for width in (128, 1024)]
        for cell in ("rnn", "gru", "lstm")
    )
    quoted(
        f"an RNN has {rnn[0]} of ONNX Runtime's speed at H = 128 and {rnn[1]} at H = 1024, a GRU "
        f"{gru[0]} and {gru[1]}, an LSTM {lstm[0]} and {lstm[1]}",
        PAGE,
    )


def test_bfloat16_weights_with_avx2() -> None:
    gains = {
        (r.case.N, r.case.H): 1 / (r.speedup("fastrnn-bf16") or 1)
        for r in held(EPYC).values()
        if r.case.group == "bf16"
    }
    many = [gain for (rows, _), gain in gains.items() if rows >= 8]
    quoted(
        f"{gains[1, 512]:.1f} and {gains[1, 1024]:.1f} times our float32 with one row at H = 512 "
        f"and 1024, where the bytes count, {gains[2, 1024]:.1f} and {gains[4, 1024]:.1f} times "
        f"with two and four rows at H = 1024; "
        f"from eight rows on as fast as float32 ({min(many):.2f} to {max(many):.2f})",
        PAGE,
    )


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_one_tiny_call(mode: str) -> None:
    rows = [r for r in held(ZEN5).values() if r.case.group == "overhead" and r.case.mode == mode]
    assert not any(record.disturbed for record in rows)
    mine = [(vs_torch(r) or 0, r.case.cell.upper(), r.case.option) for r in rows]
    eager = [ratio for ratio, _, option in mine if not option]
    compiled = sorted((ratio, cell) for ratio, cell, option in mine if option)
    (low, first), (high, last) = compiled[0], compiled[-1]
    ends = {"forward": "its speed in inference", "training": "with gradients"}
    quoted(f"{low:.2f} ({first}) to {high:.2f} times ({last}) {ends[mode]}", PAGE)
    start = {"forward": "ours is ", "training": "and "}[mode]
    quoted(f"{start}{min(eager):.1f} to {max(eager):.1f}", PAGE)


def test_zen_5() -> None:
    found = held(ZEN5)
    grid = [record for record in found.values() if record.case.group == "grid"]
    behind = beside_torch_and_onnx(grid)
    rnn, gru = behind.pop("rnn/forward/T1-N1-H128"), behind.pop("gru/forward/T1-N1-H128")
    assert not behind
    quoted(f"one call of an RNN ({rnn:.2f}) and of a GRU ({gru:.2f})", BOTH[:1])
    isa = [
        r.speedup("fastrnn@avx2", "fastrnn@auto") for r in found.values() if r.case.group == "isa"
    ]
    low, high = (1 / f(ratio or 0 for ratio in isa) for f in (max, min))
    quoted(f"has {low:.2f} to {high:.2f} of its own speed", PAGE)
    large = [(vs_torch(r) or 0, r.case) for r in grid if r.case.H == 1024 and r.case.N >= 32]
    (least, case), (most, _) = (f(large, key=lambda r: r[0]) for f in (min, max))
    what = f"{case.cell.upper()} {'training' if case.mode == 'training' else 'inference'}"
    shape = f"{case.T} steps of {case.N} rows"
    quoted(f"from {least:.2f} ({what}, {shape}) to {most:.1f} times", PAGE)


def test_batch_norm_on_zen_5() -> None:
    rows = {k: r for k, r in held(ZEN5).items() if k.startswith("bnlstm/training/")}
    ratios = {key: vs_loop(record) or 0 for key, record in rows.items()}
    wide, middle = (f"bnlstm/training/{s}/loops" for s in ("T50-N64-H512", "T100-N32-H256"))
    assert min(ratios, key=ratios.__getitem__) == wide
    costs = sorted(vs_plain(record) or 0 for record in rows.values())
    quoted(
        f"{ratios[wide]:.1f} (64 rows at H = 512) to {max(ratios.values()):.1f} times, "
        f"{ratios[middle]:.1f} with 32 rows at H = 256; it costs {costs[0]:.2f} to "
        f"{costs[-1]:.2f} times our plain LSTM",
        PAGE,
    )
