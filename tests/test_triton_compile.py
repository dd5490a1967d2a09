"""Every Triton kernel, compiled for GPUs that are not here: PTX, then machine code by ptxas.

Registers and spills are ptxas's word; what runs fast is for a GPU to say.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the interpreter does not compile"
    ),
]

SHARED = {80: 163 * 1024, 90: 227 * 1024}
# Bytes a thread may spill: a few values in what ought to fit, more where registers are known to be
# too few, and never what a matrix that was meant to be elsewhere would take.
SPILL = {False: 64, True: 512}
# Of any kernel, before Triton 3.9, whose compiler has the fewest spills.
SPILL_BEFORE = 1024
FLOATS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# Tensors that are float32 whatever the data are.
WIDE = {"bias", "gates", "cells", "dcells", "states", "tape"}
INDICES = {"lengths": "*i64", "offsets": "*i64", "seed": "*i64", "reset": "*u8"}


@dataclass(frozen=True)
class Case:
    """A kernel and what it is compiled for; options are its other constants."""

    kernel: str
    dtype: str = "bfloat16"
    H: int = 64
    precision: str = "ieee"
    features: tuple[str, ...] = ()
    mode: str = ""
    tight: bool = False

    def __str__(self) -> str:
        words = [self.kernel, self.dtype, f"H{self.H}", self.precision, *self.features, self.mode]
        return "-".join(word for word in words if word)


EVERYTHING = ("lengths", "reset", "seed", "zoneout")
CASES = [
    *(
        Case(f"{cell}_{way}", dtype, H, precision)
        for cell in ("lstm", "gru", "rnn")
        for way in ("forward", "backward")
        for dtype, H, precision in (("bfloat16", 128, "ieee"), ("float32", 64, "tf32"))
    ),
    # Weights of 512 KB and of 256 KB, which are read in each step.
    *(Case(f"lstm_{w}", "float16", 256, tight=True) for w in ("forward", "backward")),
    *(Case(f"lstm_{w}", "float32", 128, "tf32") for w in ("forward", "backward")),
    *(Case(f"lstm_{w}", "float32", 64, "tf32x3", tight=True) for w in ("forward", "backward")),
    *(
        Case(f"{cell}_{way}", features=(*EVERYTHING, *more), mode=mode)
        for cell, mode, more in (
            ("lstm", "update", ()),
            ("lstm", "cell", ("offsets",)),
            ("lstm", "state", ("proj",)),
            ("gru", "update", ()),
            ("gru_before", "state", ("offsets",)),
            ("rnn", "state", ()),
        )
        for way in ("forward", "backward")
    ),
    *(Case(f"rhn_{w}", H=64, features=f) for w in ("forward", "backward") for f in ((), ("mask",))),
    *(
        Case(f"bnlstm_{w}", "float32", 32, "tf32", f, tight=True)
        for w in ("forward", "backward")
        for f in ((), ("lengths", "reset"))
    ),
]


def find(name: str) -> Any:
    from fastrnn.backends.triton import bnlstm_kernels, gru, lstm, rhn_kernels, rnn

    name = name.replace("_before", "") + "_kernel"
    modules = (bnlstm_kernels, gru, lstm, rhn_kernels, rnn)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def constants(case: Case) -> tuple[dict[str, Any], int]:
    """The compile-time arguments, and the number of warps."""
    from fastrnn.backends.triton.plan import choose, padded

    cell = case.kernel.split("_")[0]
    proj = 20 if "proj" in case.features else case.H
    gates = {"gru": 3, "rnn": 1, "rhn": 3}.get(cell, 4)
    itemsize = 4 if case.dtype == "float32" else 2
    plan = choose(cell, gates, case.H, proj, itemsize, 20, 2)
    drawn = "seed" in case.features
    found: dict[str, Any] = {
        "H": case.H, "P": proj, "D": 2, "L": 3, "G": 3, "GROUPS": 3 * ("mask" in case.features),
        "HP": plan.units, "PP": padded(proj), "BT": plan.rows, "STREAM": plan.stream,
        "PRECISION": case.precision, "WIDEN": False, "MODE": case.mode, "TRAINING": drawn,
        "SEQUENCE": 0, "ZONE_H": "zoneout" in case.features, "ZONE_C": "zoneout" in case.features,
        "AFTER": "before" not in case.kernel, "RELU": bool(case.mode), "BATCH": True,
        "BATCH_IH": True, "SHARED_IH": False, "W": -(-4 * case.H // 16) * 32,
    }  # fmt: skip
    absent = {"lengths", "reset", "offsets", "seed"} - set(case.features)
    absent |= {"w_hr", "dh_out", "outs"} if "proj" not in case.features else set()
    absent |= {"s_mask"} if "mask" not in case.features else set()
    absent |= {"products"} if "before" not in case.kernel else set()
    absent |= {"gates"} if cell == "rnn" and not case.features else set()
    return found | dict.fromkeys(absent), plan.warps


def kind(name: str, dtype: str) -> str:
    """The type of a run-time argument."""
    if name in INDICES:
        return INDICES[name]
    if name in ("T", "N", "R", "stride_t", "stride_n", "stream", "zero") or name.startswith("rows"):
        return "i32"
    if name.endswith("threshold"):
        return "i64"
    if name == "eps" or name.endswith("value"):
        return "fp32"
    return "*" + FLOATS["float32" if name in WIDE else dtype]


def source_of(kernel: Any, values: dict[str, Any], dtype: str) -> Any:
    """The kernel with its constants and the types of all else; pointers are multiples of 16."""
    from triton.backends import compiler
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: kind(name, dtype) for name in names if name not in values}
    pointers = [names.index(name) for name, text in types.items() if text.startswith("*")]
    if hasattr(compiler, "AttrsDescriptor"):  # Triton 3.2
        hints = compiler.AttrsDescriptor.from_hints(dict.fromkeys(pointers, 16))
        return ASTSource(kernel, types, values, hints)
    signature = {name: types.get(name, "constexpr") for name in names}
    hints = {(at,): [["tt.divisibility", 16]] for at in pointers}
    return ASTSource(kernel, signature, values, hints)


def compile_for(case: Case, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    from fastrnn.backends.triton.host import OPTIONS

    kernel = find(case.kernel)
    fixed, warps = constants(case)
    values = {name: fixed[name] for name in kernel.arg_names if name in fixed}
    source = source_of(kernel, values, case.dtype)
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=OPTIONS | {"num_warps": warps})


def ptxas(ptx: str, arch: int, folder: Path) -> str:
    """What ptxas -v says; of the wheel's two, the one that knows the language's version."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    for tool in sorted(tools.glob("ptxas*")):
        command = [str(tool), "-v", f"--gpu-name={name}", str(path), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stderr
        assert "Unsupported .version" in done.stderr, done.stderr
    pytest.skip("this wheel of triton has no ptxas for its PTX")


def most_spilled(case: Case) -> int:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return SPILL[case.tight] if (int(major), int(minor)) >= (3, 9) else SPILL_BEFORE


def runs() -> list[Any]:
    """Every case for both; a few, for one, are not slow."""
    quick = (Case("lstm_forward"), Case("gru_backward"), Case("rhn_forward"))
    slow = [
        pytest.param(case, arch, marks=pytest.mark.slow, id=f"{case}-sm{arch}")
        for case in CASES
        for arch in SHARED
    ]
    return [pytest.param(case, 90, id=f"{case}-sm90-quick") for case in quick] + slow


@pytest.mark.parametrize("case, arch", runs())
def test_compiles(case: Case, arch: int, tmp_path: Path) -> None:
    """Tensor cores are used, shared memory suffices, and weights stay in registers."""
    compiled = compile_for(case, arch)
    ptx = compiled.asm["ptx"]
    assert re.search(r"mma\.sync|wgmma\.mma_async", ptx)
    assert not re.search(r"\batom\.|\bred\.", ptx), "an atomic operation"
    assert compiled.metadata.shared <= SHARED[arch]
    said = ptxas(ptx, arch, tmp_path)
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert registers, said
    assert spilled, said
    print(f"{case} sm_{arch}: {registers[0]}, {spilled[0]}, shared {compiled.metadata.shared}")
    assert int(spilled[1]) <= most_spilled(case), said
