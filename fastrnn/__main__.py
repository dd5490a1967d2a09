"""`python -m fastrnn`: what is installed, what runs where, and whether it computes the right thing.

Exit code 0 if every cell that was compared agrees with the reference, forward and backward; 1 if
one differs, if none was compared, as under FASTRNN_BACKEND=torch, whose kernels take no `lengths`,
or if the native library does not load and FASTRNN_BACKEND asks for no backend.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.backends import CPU_MISSING, cuda_missing

# The layers that the self-check runs: an odd size, two layers, both directions.
_LAYERS: dict[str, nn.RNNBase | fastrnn.BNLSTM] = {
    "lstm": fastrnn.LSTM(7, 13, 2, bidirectional=True),
    "lstm, proj_size": fastrnn.LSTM(7, 13, 2, bidirectional=True, proj_size=5),
    "lstm, layer_norm": fastrnn.LSTM(7, 13, 2, bidirectional=True, layer_norm=True),
    "gru": fastrnn.GRU(7, 13, 2, bidirectional=True),
    "gru, layer_norm": fastrnn.GRU(7, 13, 2, bidirectional=True, layer_norm=True),
    "gru, reset_after=False": fastrnn.GRU(7, 13, 2, bidirectional=True, reset_after=False),
    "rnn, tanh": fastrnn.RNN(7, 13, 2, bidirectional=True),
    "rnn, relu": fastrnn.RNN(7, 13, 2, "relu", bidirectional=True),
    "rhn": fastrnn.RHN(7, 13, 2, bidirectional=True, depth=3),
    "rhn, couple_carry=False": fastrnn.RHN(
        7, 13, 2, bidirectional=True, depth=3, couple_carry=False
    ),
    "bnlstm": fastrnn.BNLSTM(7, 13, 2, bidirectional=True, max_length=9, eps=0.1),
}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):  # a file of Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _native() -> Iterator[tuple[str, str]]:
    try:
        from fastrnn import _cpu
    except ImportError as error:
        yield "instructions", f"none: the native CPU library does not load ({error})"
        return
    yield "instructions", f"{_cpu.isa()} (available: {', '.join(_cpu.isas())})"
    yield "thread team", _cpu.team_kind()


def _cuda() -> str:
    why = cuda_missing()
    if why:
        return f"{why}; tensors on a GPU run on Triton's kernels or torch's own"
    return f"{torch.cuda.get_device_name()}; fastrnn.explain says what runs a call there, and why"


def _lengths(x: Tensor) -> list[int]:
    return [x.size(0) - 2 * n for n in range(x.size(1))]


def _run(module: nn.Module, x: Tensor, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    """Output, final states and every gradient of one call."""
    module = copy.deepcopy(module).to(dtype)
    x = x.detach().to(dtype, copy=True).requires_grad_()
    with fastrnn.use_backend(backend) if backend else contextlib.nullcontext():
        output, state = module(x, lengths=_lengths(x))
        results = [output, *(state if isinstance(state, tuple) else (state,))]
        slopes = [torch.linspace(-1, 1, r.numel(), dtype=dtype).view_as(r) for r in results]
        torch.autograd.backward(results, slopes)
    grads = (leaf.grad for leaf in (x, *module.parameters()))
    return [*(r.detach() for r in results), *(grad for grad in grads if grad is not None)]


def self_check(module: nn.RNNBase | fastrnn.BNLSTM) -> str:
    """ "ok", or what differs: float32 against the float64 reference, by the rule of the tests:
    at most 4 times the error of the float32 reference and 16 roundings."""
    x = torch.randn(11, 3, module.input_size)
    got = _run(module, x, torch.float32, None)
    same = _run(module, x, torch.float32, "reference")
    exact = _run(module, x, torch.float64, "reference")
    for index, (a, b, truth) in enumerate(zip(got, same, exact, strict=True)):
        scale = max(1.0, float(truth.abs().max()))
        allowed = 4 * float((b - truth).abs().max()) + 16 * torch.finfo(torch.float32).eps * scale
        error = float((a - truth).abs().max())
        if not error <= allowed:
            return f"FAILED: result {index} is off by {error:.3g}, {allowed:.3g} allowed"
    return "ok"


def _source_tree(root: Path) -> str:
    """What to do if the package beside `root`'s setup.py is the source, where nothing is built."""
    if not ((root / "setup.py").is_file() and (root / "csrc").is_dir()):
        return ""
    return (
        f"\n{root} is the source tree, not the installed package: after `pip install .` leave it "
        "(`cd ..`), or run `python -I -m fastrnn`; `make build` builds the library in place"
    )


def main(arguments: list[str] | None = None) -> int:
    what = "Prints what is installed and what runs where, and checks every cell."
    argparse.ArgumentParser("python -m fastrnn", description=what).parse_args(arguments)
    lines = [
        ("fastrnn", fastrnn.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("CPU", f"{_cpu_name()}, {torch.get_num_threads()} threads"),
        *_native(),
        ("CUDA", _cuda()),
    ]
    for name, text in lines:
        print(f"{name:<13} {text}")
    print()
    asked = bool(os.environ.get("FASTRNN_BACKEND"))
    count: Counter[str] = Counter()
    for name, module in _LAYERS.items():
        # Each cell alone, so that one that cannot run does not hide the others.
        try:
            x = torch.randn(11, 3, module.input_size)
            backend = fastrnn.explain(module, x, lengths=_lengths(x)).backend
        except RuntimeError as error:  # no backend, or not the one that was asked for
            print(f"{name:<24} not run: {error}")
            count["not run"] += 1
            continue
        if backend == "reference" and not asked:
            print(f"{name:<24} {backend:<10} not compared: it is what cells are compared with")
            count["not compared"] += 1
            continue
        try:
            with torch.random.fork_rng(devices=[]):  # the same numbers every time
                torch.manual_seed(0)
                module.reset_parameters()
                verdict = self_check(module)
        except RuntimeError as error:
            verdict = f"FAILED: {error}"
        print(f"{name:<24} {backend:<10} self-check {verdict}")
        count["ok" if verdict == "ok" else "failed"] += 1
    ran = count["ok"] + count["failed"]
    left_out = [f"; {count[why]} {why}" for why in ("not run", "not compared") if count[why]]
    print(
        f"\n{'FAILED' if count['failed'] else 'ok' if ran else 'NOTHING COMPARED'}: {count['ok']} "
        f"of {ran} cells agree with the float64 reference, forward and backward{''.join(left_out)}"
    )
    if CPU_MISSING and not asked:
        why = f"the native library does not load: {CPU_MISSING}"
        print(f"FAILED: {why}{_source_tree(Path(fastrnn.__file__).parents[1])}")
        return 1
    return 1 if count["failed"] or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
