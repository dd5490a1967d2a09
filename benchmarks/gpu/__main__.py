"""The GPU campaign: builds, probes, tests, times and fits on the present GPU, stage by stage.

Without arguments every stage that is not complete yet runs, in the order of its value. Results are
JSON under benchmarks/results/<device>; running again goes on where the last run stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.arguments import need, read
from benchmarks.gpu import device
from benchmarks.gpu.campaign import Campaign, ProcessRunner, Stage, ended_by_signals
from benchmarks.gpu.stage import (
    COMPLETE,
    PARTIAL,
    RED,
    RESTART,
    TESTS,
    Stop,
    Wrong,
    load,
    save,
    say,
)
from benchmarks.schema import RESULTS, slug

BUDGET = 540.0  # seconds of a run: under ten minutes with the start and the end of everything


def _built() -> bool:
    from benchmarks.gpu import build

    return build.built(device.architecture())


STAGES = (
    Stage("build", 420, "the native modules for this GPU", valid=_built),
    Stage("probes", 90, "wrappers, hops, rates, cluster launches", needs="build"),
    Stage(
        "tests",
        180,
        "kernels against the float64 reference, repeats, graphs, streams",
        "build",
        resumable=True,
    ),
    Stage("steps", 120, "us/step of the kernels alone, by exchange", "build", resumable=True),
    Stage("grid-headline", 60, "LSTM T1024 N16 H768 against cuDNN", "build", resumable=True),
    Stage(
        "grid-16bit", 240, "bfloat16 LSTM and GRU, H 256..1024, N 1..64", "build", resumable=True
    ),
    Stage("grid-loops", 240, "RHN and BN-LSTM against loops", "build", resumable=True),
    Stage("grid-fp32", 240, "float32 (TF32), the same shapes", "build", resumable=True),
    Stage("grid-options", 180, "two directions, packed batches", "build", resumable=True),
    Stage("grid-small", 240, "H up to 192", "build", resumable=True),
    Stage("sanitize", 460, "compute-sanitizer on tiny grids", "build", resumable=True),
    Stage("grid-triton", 150, "H up to 128, N from 512", "build", resumable=True),
    Stage("grid-large", 180, "H 1536 and 2048, N 128 and 256", "build", resumable=True),
    Stage("refit", 60, "the cost model's constants, the dispatch table", always=True, gpu=False),
    Stage("report", 30, "tables, targets", always=True, gpu=False),
)
NAMES = [stage.name for stage in STAGES]


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    it.add_argument(
        "--stage", action="append", choices=NAMES, metavar="NAME",
        help="only this one; may be given several times (see --list)",
    )  # fmt: skip
    it.add_argument("--list", action="store_true", help="print the stages and leave")
    it.add_argument("--force", action="store_true", help="run stages that are complete again")
    it.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds for all of them (%(default)s)"
    )
    it.add_argument(
        "--results", type=Path, help="folder of the results (benchmarks/results/<device>)"
    )
    it.add_argument(
        "--write", action="store_true",
        help="refit: put times and verified kernels into fastrnn/gpu/table.json, which dispatch "
        "goes by, and fitted constants into csrc/cuda/cost_model.h",
    )  # fmt: skip
    it.add_argument("--plot", action="store_true", help="draw docs/img/gpu_*.svg and leave")
    it.add_argument("--inside", choices=NAMES, help=argparse.SUPPRESS)
    it.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return it


def main(arguments: list[str] | None = None) -> int:
    """0: all complete and green. 1: something red or left to do. 2: no GPU, or bad arguments."""
    it = parser()
    options = it.parse_args(arguments)
    if options.list:
        for stage in STAGES:
            print(f"{stage.name:14} {stage.seconds:4.0f} s  {stage.text}")
        return 0
    names = [options.inside] if options.inside else options.stage or NAMES
    chosen = [stage for stage in STAGES if stage.name in names]
    if options.plot and not options.results:
        it.error("--plot needs --results, the folder of a campaign's grid.json")
    if options.plot:
        return _plot(it, options.results)
    missing = device.no_gpu()
    needed = any(stage.gpu for stage in chosen)
    if missing and (needed or not options.results):
        way = "" if needed else f"; {' and '.join(names)} need none if --results names the folder"
        print(missing + way, file=sys.stderr)
        return 2
    results = options.results or RESULTS / slug(device.name())
    if options.inside:
        return inside(options.inside, results, Stop(options.seconds), options.write)
    # What only reads results leaves the machine that they are of in them.
    environment = device.describe() if needed else None
    campaign = Campaign(
        chosen, results, ProcessRunner(results, ["--write"] if options.write else [])
    )
    other = campaign.other_place(environment)
    if other:
        it.error(f"--results {results} is of {other}; name a folder for this one")
    with ended_by_signals():
        if options.force:
            _forget(chosen, results)
        done = campaign.run(options.budget, options.force, environment)
    say(f"results in {results}")
    return 0 if done else 1


def _forget(chosen: list[Stage], results: Path) -> None:
    """Takes the cases and tests of forced stages out of the results: they are run again."""
    from benchmarks.gpu.suite import SANITIZER
    from benchmarks.schema import Results

    names = {stage.name for stage in chosen}
    ids = {case.id for name in names for case in _cases(name)}
    path = results / "grid.json"
    if ids and path.exists():
        held = Results.load(path)
        held.records = [record for record in held.records if record.case.id not in ids]
        held.save(path)
    tests = load(results / TESTS).get("tests", {})
    kept = {
        name: each
        for name, each in tests.items()
        if ("sanitize" if SANITIZER.name in name else "tests") not in names
    }
    if len(kept) < len(tests):
        save(results / TESTS, {"tests": kept})


def _cases(stage: str) -> list[Any]:
    from benchmarks.gpu.cases import GRIDS

    if stage == "steps":
        from benchmarks.gpu import steps

        return steps.cases()
    return GRIDS[stage]() if stage in GRIDS else []


def inside(name: str, results: Path, stop: Stop, write: bool = False) -> int:
    """The body of a stage, in this process; its exit status."""
    from benchmarks.gpu.grid import Broken

    try:
        if name == "build":
            from benchmarks.gpu import build

            build.run(stop)
        elif name == "probes":
            _probes(results, stop)
        elif name in ("tests", "sanitize"):
            from benchmarks.gpu import suite

            return suite.run(
                [suite.SANITIZER if name == "sanitize" else suite.FOLDER], results, stop
            )
        elif name == "refit":
            _refit(results, write)
        elif name == "report":
            _report(results)
        else:
            return _timed(name, results, stop)
    except Broken as broken:
        say(f"{name}: {broken.args[0].case.id}: {broken.args[0].error}")
        return RESTART
    except subprocess.TimeoutExpired as error:
        say(f"{name}: out of time during {error.cmd[0]}")
        return PARTIAL
    except RuntimeError as error:
        say(f"{name}: {error}")
        return RED if isinstance(error, Wrong) else 3
    return COMPLETE


def _probes(results: Path, stop: Stop) -> None:
    from benchmarks.gpu import probes

    home = os.environ.get("CUDA_HOME", "")
    nvcc = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc was not found in PATH or CUDA_HOME")
    probes.run(results, stop, nvcc)


def _timed(name: str, results: Path, stop: Stop) -> int:
    """The grids and the steps: PARTIAL with cases left, RED with red ones."""
    import torch

    from benchmarks.gpu import grid
    from benchmarks.gpu.roofline import Ceilings
    from benchmarks.schema import Results

    # Both sides multiply float32 as TF32: cuDNN's layers do by default, torch.mm must be told to.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    environment = device.describe()
    setting = grid.Setting(
        ceilings=Ceilings.from_probes(load(results / "probes.json")), sms=environment["sms"]
    )
    cases = _cases(name)
    if name == "steps":
        from benchmarks.gpu import steps
        from benchmarks.gpu.model import CostModel
        from fastrnn.backends import cuda_native

        with CostModel() as model:
            model.device(cuda_native._device(torch.cuda.current_device()))
            body: Callable[..., Any] = lambda case, how: steps.run_case(case, how, model)  # noqa: E731
            whole = grid.run(cases, results, stop, environment, setting, body)
    else:
        whole = grid.run(cases, results, stop, environment, setting)
    if not whole:
        return PARTIAL
    ids = {case.id for case in cases}
    records = [r for r in Results.load(results / grid.FILE).records if r.case.id in ids]
    return RED if any(not r.ok or r.details.get("red") for r in records) else COMPLETE


def _refit(results: Path, write: bool) -> None:
    """refit.json and dispatch.json of what was measured so far; with --write the library's too."""
    from benchmarks.gpu import model, refit, table
    from benchmarks.schema import Results

    path = results / "grid.json"
    if not path.exists():
        raise RuntimeError(f"{path} does not exist: nothing was timed yet")
    held = Results.load(path)
    source = f"{held.environment['device']}, {held.environment['date']}"
    tests = load(results / TESTS).get("tests", {})
    found_here = table.entry(held.records, tests, held.environment)
    save(results / "dispatch.json", found_here)
    if write:
        table.write(found_here)
        say(f"written to {table.TABLE}: dispatch on such a GPU goes by it")
    measured = refit.measured_steps(held.records)
    if not measured:
        raise RuntimeError("the stage `steps` has no verified kernel yet: no constants to fit")
    probed = refit.probed_constants(load(results / "probes.json"))
    with model.CostModel() as evaluator:
        found = refit.fit(evaluator, measured, model.read_constants(), probed)
    save(
        results / "refit.json",
        {
            "source": source,
            "probed": probed,
            "before": model.read_constants(),
            "constants": found.constants,
            "typical_factor": found.typical,
            "worst_factor": found.worst,
            "rows": [[list(vars(step).values()), *times] for step, *times in found.rows],
        },
    )
    say(refit.text(found))
    if write:
        words = f"fitted to {len(measured)} kernels timed on {source}, benchmarks/gpu/refit.py."
        model.write_constants(found.constants, words)
        say(f"written to {model.HEADER}")


def _report(results: Path) -> None:
    from benchmarks.gpu import report

    text = report.text(results)
    (results / "report.txt").write_text(text + "\n")
    print(text, flush=True)


def _plot(it: argparse.ArgumentParser, results: Path) -> int:
    need(it, "matplotlib")
    from benchmarks.gpu import plot
    from benchmarks.plot import IMAGES

    path = results / "grid.json"
    found = read(it, path)
    try:
        drawn = plot.draw_all(found, IMAGES)
    except ValueError as error:
        it.error(f"{path}: {error}")
    print("drawn: " + ", ".join(str(path) for path in drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main())
