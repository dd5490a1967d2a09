"""What the programs ask of their arguments before anything is measured: files and packages."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.schema import Results


def need(it: argparse.ArgumentParser, *modules: str) -> None:
    """Ends the program if one of these is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            it.error(f"{module} is not installed; pip install 'fastrnn[bench]'")


def check_out(it: argparse.ArgumentParser, path: Path | None) -> None:
    """Ends the program if no JSON, or no CSV beside it, can be written there; makes the folder."""
    if path is None:
        return
    if path.suffix != ".json":
        it.error(f"--out is {path}; expected a name that ends in .json, a CSV may go beside it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        it.error(f"--out {path}: nothing can be written in its folder ({error}); name another")
    for each in (path, path.with_suffix(".csv")):
        if each.is_dir() or (each.exists() and not os.access(each, os.W_OK)):
            it.error(f"--out {path}: {each} is a folder or read-only; name another")


def read(it: argparse.ArgumentParser, path: Path | None) -> Results:
    """The results in a file, by default the committed ones; ends the program if it has none."""
    from benchmarks.schema import Results, newest  # which needs numpy

    try:
        path = path or newest()
        return Results.load(path)
    except OSError as error:
        it.error(str(error))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        it.error(f"{path} holds no results of a run: {type(error).__name__}: {error}")
