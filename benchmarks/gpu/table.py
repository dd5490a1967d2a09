"""What dispatch on a GPU goes by, from a campaign: an entry of `fastrnn/gpu/table.json`.

Rows are the times of verified contestants; verified are the families of kernels all of whose tests
of the stage `tests` passed. Written by `--stage refit --write`, in the place of the entry that the
same device had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.schema import Record
from fastrnn.gpu.times import TABLE

# The loop of the benchmarks stands for the reference: both are launches of every step.
NAMES = {"fastrnn": "cuda", "fastrnn-triton": "triton", "torch": "torch", "loop": "reference"}
BACKENDS = {"test_gpu_modules.py": "cuda", "test_gpu_triton.py": "triton"}
CUDA_FILES = ("test_gpu_layer.py", "test_gpu_runtime.py")
FORMATS = {"float32": "tf32"}  # as the tests and the grids multiply it


def entry(
    records: Sequence[Record], tests: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """What was found on one device."""
    return {
        "name": environment["device"],
        "sms": environment["sms"],
        "source": f"{environment['device']}, {environment['date']}",
        "verified": verified(tests),
        "rows": rows(records),
    }


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Of every case with two contestants or more: microseconds by backend."""
    found = []
    for record in records:
        case = record.case
        known = {NAMES[name]: name for name in NAMES if name in record.timings}
        if not record.ok or case.group == "steps" or case.proj or case.option or len(known) < 2:
            continue
        slopes = record.details.get("us_per_step", {})
        us: dict[str, float] = {}
        call: dict[str, float] = {}
        for backend, name in known.items():
            total = 1e6 * record.timings[name].median
            us[backend] = total / case.T
            if slopes.get(name, 0.0) > 0:
                us[backend] = slopes[name]
                call[backend] = round(max(0.0, total - case.T * slopes[name]), 3)
        found.append(
            {
                "cell": "rnn_tanh" if case.cell == "rnn" else case.cell,
                "format": FORMATS.get(case.dtype or "float32", case.dtype),
                "training": case.mode == "training",
                "directions": case.directions,
                "packed": case.ragged == "packed",
                "depth": case.depth,
                "T": case.T,
                "N": case.N,
                "H": case.H,
                "us": {backend: round(each, 4) for backend, each in us.items()},
                "call": call,
            }
        )
    return found


def verified(tests: Mapping[str, Any]) -> list[list[str]]:
    """[backend, family, format] with a test that passed and none that did not.

    A failure among the tests of CUDA layers, or of what they do at run time, takes all of CUDA's.
    """
    outcomes: dict[tuple[str, str, str], set[str]] = {}
    broken = False
    for name, each in tests.items():
        path, _, call = name.partition("::")
        file = path.rpartition("/")[2]
        broken |= file in CUDA_FILES and each["outcome"] not in ("passed", "skipped")
        if file not in BACKENDS or not call.startswith("test_module["):
            continue
        module, dtype = _parameters(call)
        key = (BACKENDS[file], family_of(module), FORMATS.get(dtype, dtype))
        outcomes.setdefault(key, set()).add(each["outcome"])
    ran_layers = any(name.partition("::")[0].endswith(CUDA_FILES) for name in tests)
    return [
        list(key)
        for key, found in sorted(outcomes.items())
        if "passed" in found
        and found <= {"passed", "skipped"}
        and (key[0] != "cuda" or (ran_layers and not broken))
    ]


def _parameters(call: str) -> tuple[str, str]:
    """Module and dtype of test_module[module-dtype-call] or test_module[call-module-dtype]."""
    before, _, after = call.partition("[")[2].rstrip("]").partition("-torch.")
    dtype, _, last = after.partition("-")
    return before if last else before.partition("-")[2], dtype


def family_of(module: str) -> str:
    """The family (`fastrnn.gpu.times.family`) of a module of tests/gpu/test_gpu_modules.py."""
    cell, _, option = module.partition("-")
    if cell == "rnn":
        return "rnn_tanh"
    if option == "proj":
        return f"{cell}+projection"
    if option == "layer-norm":
        return f"{cell}_layer_norm"
    if option == "reset-before":
        return "gru_reset_before"
    if option == "uncoupled":
        return "rhn_uncoupled"
    if option == "gate-masks":
        return f"{cell}+gate masks"
    plain = ("", "2-layers", "both", "recompute", "weight-dropout", "deep", "beyond", "masks")
    return cell if option in plain else f"{cell}+regularisers"


def write(found: Mapping[str, Any], path: Path = TABLE) -> None:
    """Puts an entry into the library's data, in the place of that of the same device."""
    data = json.loads(path.read_text())
    same = (found["name"], found["sms"])
    others = [each for each in data["devices"] if (each["name"], each.get("sms")) != same]
    data["devices"] = [*others, dict(found)]
    data["provenance"] = (
        "rows and verified kernels: the campaigns named by `source`; the model's constants: "
        "estimates for an H200-class device from published figures of others (docs/backends.md)"
    )
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(partial, path)
