"""Verifies fastrnn against torch.nn, then times it beside torch.nn and ONNX Runtime."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from types import TracebackType

from benchmarks.arguments import check_out, need
from benchmarks.cases import Case, select


class Progress:
    """A bar in expected seconds: the time left means something though cases differ by 1000x."""

    def __init__(self, cases: int, expected: float) -> None:
        from tqdm import tqdm

        quiet = not sys.stderr.isatty()
        form = "{desc} |{bar:20}| {percentage:3.0f}% {elapsed}, {remaining} left"
        self._bar = tqdm(
            total=expected, bar_format=form, mininterval=10 if quiet else 0.1, file=sys.stderr
        )
        self._cases = cases
        self._started = 0
        self._running = 0.0

    def __call__(self, case: Case, expected: float) -> None:
        self._bar.update(self._running)
        self._started += 1
        self._running = expected
        self._bar.set_description_str(f"{self._started}/{self._cases} {case.id:<34.34}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._bar.update(max(0.0, self._bar.total - self._bar.n))
        self._bar.close()


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    size = it.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="a short list of cases, under two minutes (default)"
    )
    size.add_argument("--full", action="store_true", help="every case, under 25 minutes")
    it.add_argument(
        "--only", metavar="GLOB", help="cases whose id matches, e.g. 'gru/training/*' or N1-H512"
    )
    it.add_argument(
        "--threads", type=int, default=None, help="threads of every contestant (default: all cores)"
    )
    it.add_argument(
        "--out",
        type=Path,
        help="result JSON (default: benchmarks/results/<cpu>/quick.json or full.json, none with "
        "--only); a CSV is written beside it",
    )
    it.add_argument(
        "--plot", action="store_true", help="draw docs/img/*.svg from the results of this run"
    )
    it.add_argument("--list", action="store_true", help="print the case ids and leave")
    it.add_argument("--verify-only", action="store_true", help="verify every case, time nothing")
    return it


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if a check was red. Bad arguments end the program with status 2."""
    it = parser()
    options = it.parse_args(arguments)
    try:
        cases = select(quick=not options.full, only=options.only)
    except ValueError as error:
        it.error(str(error))
    if options.list:
        print("\n".join(case.id for case in cases))
        return 0
    threads = options.threads if options.threads is not None else len(os.sched_getaffinity(0))
    if threads < 1:
        it.error(f"--threads is {threads}; expected at least 1")
    if options.plot and options.verify_only:
        it.error("--plot draws times and --verify-only takes none; leave out one of them")
    if options.plot and not any(case.group == "grid" for case in cases):
        it.error("--plot draws cases of the grid, and --only leaves none of them")
    need(it, "numpy", "tqdm", *(["matplotlib"] if options.plot else []))

    from benchmarks import driver, report
    from benchmarks.schema import RESULTS, cpu_name, slug

    settings = (driver.full_settings if options.full else driver.quick_settings)(
        threads, options.verify_only
    )
    out = options.out
    if out is None and options.only is None and not options.verify_only:
        out = RESULTS / slug(cpu_name()) / ("full.json" if options.full else "quick.json")
    check_out(it, out)
    begin = time.perf_counter()
    with Progress(
        len(cases), sum(driver.expected_seconds(case, settings) for case in cases)
    ) as progress:
        results = driver.run(cases, settings, out, progress)
    print(report.text(results))
    verified = sum(bool(record.checks) and record.ok for record in results.records)
    print(
        f"\n{verified} cases verified, {time.perf_counter() - begin:.0f} s"
        + (f", written to {out}" if out else "")
    )
    if options.plot:
        from benchmarks import plot

        print("drawn: " + ", ".join(str(path) for path in plot.draw_all(results, plot.IMAGES)))
    return 0 if all(record.ok for record in results.records) else 1


if __name__ == "__main__":
    sys.exit(main())
