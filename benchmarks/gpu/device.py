"""Which GPU, driver and versions a result belongs to, and why there may be none."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.schema import slug, version_of


def no_gpu() -> str:
    """Why the campaign cannot run here, in one line; empty if it can."""
    try:
        import torch
    except ImportError:
        return "no GPU campaign: this Python has no torch"
    if not torch.cuda.is_available():
        return "no GPU campaign: torch finds no GPU here (torch.cuda.is_available() is False)"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"no GPU campaign: kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return ""


def architecture() -> str:
    """The present GPU's, as CMake and nvcc spell it: "90a" for Hopper's own instructions."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def name() -> str:
    import torch

    return str(torch.cuda.get_device_name())


def describe() -> dict[str, Any]:
    """Everything a reader needs to place the numbers; the keys of benchmarks.schema and more."""
    import torch

    import fastrnn

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "device_slug": slug(properties.name),
        "cpu": properties.name,  # what tables and figures call the machine
        "isa": f"compute capability {properties.major}.{properties.minor}",
        "cores": properties.multi_processor_count,
        "threads": torch.get_num_threads(),
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda or "none",
        "cudnn": torch.backends.cudnn.version(),
        "fastrnn": fastrnn.__version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "onnxruntime": "none",
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if not shutil.which(query[0]):
        return "unknown"
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
