"""What the examples share: where they write, checks of their arguments, the progress bar."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

OUTPUT = Path(__file__).parent / "output"


def add_common(it: argparse.ArgumentParser) -> None:
    """Arguments that every example takes."""
    it.add_argument("--seed", type=int, default=0)
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


def set_threads(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def progress(total: int, label: str, done: int = 0) -> tqdm:
    return tqdm(total=total, initial=done, desc=f"{label:>8}", file=sys.stderr)
