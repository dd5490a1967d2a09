"""What the examples share: where they write, checks of their arguments, the progress bar."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

OUTPUT = Path(__file__).parent / "output"


def add_common(it: argparse.ArgumentParser) -> None:
    """Arguments that every example takes."""
    it.add_argument("--seed", type=int, default=0, help="of all random numbers, 0 <= seed < 2**63")
    it.add_argument("--threads", type=int, default=None, help="default: torch's own choice")


def check_at_least(
    it: argparse.ArgumentParser, options: argparse.Namespace, least: float, *names: str
) -> None:
    """Ends the program if one of these arguments is given and below ``least``."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            flag = "--" + name.replace("_", "-")
            it.error(f"{flag} is {value}; expected at least {least}")


def check_above_zero(it: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if not getattr(options, name) > 0:
            it.error(f"--{name} is {getattr(options, name)}; expected a number above 0")


def check_common(it: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program for those of ``add_common``."""
    check_at_least(it, options, 1, "threads")
    if not 0 <= options.seed < 2**63:
        it.error(f"--seed is {options.seed}; expected 0 <= seed < 2**63")


def check_writable(it: argparse.ArgumentParser, flag: str, path: Path) -> None:
    """Ends the program if no file can be written there; makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        it.error(f"{flag} {path} cannot be written ({error}); name another file")


def need(*modules: str) -> None:
    """Ends the program if one of these is not installed."""
    for module in modules:
        if find_spec(module) is None:
            raise SystemExit(f"{module} is not installed; pip install 'fastrnn[bench]'")


def set_threads(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def progress(total: int, label: str, done: int = 0) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=f"{label:>8}", file=sys.stderr)
