#!/usr/bin/env python3
"""Compiles the CUDA kernels and judges what ptxas says: no spill, no local memory, few registers.

Needs nvcc, no GPU: `python scripts/cuda_gate.py --arch 90a`. With cuobjdump at hand, the toolkit's
or the one that Triton brings, it also looks into the machine code.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda" / "inst"
ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
# 64 Ki registers of an SM for a CTA of 256 threads: the most that a thread can have.
MOST_REGISTERS = 255

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '\S+'\n"
    r".*?\n\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*?Used (?P<registers>\d+) registers"
)
WORDS = re.compile(
    r"(LayerNormLstm|LayerNormGru|Lstm|GruILb[01]|RnnILb[01]|RhnILb[01]|Bf16x3|Bf16|Fp16|Tf32"
    r"|Sentinel|Flags|Local|Cluster)"
)
WANTED = re.compile(
    r"(bnlstm_|projected_)?(forward|backward)_kernelINS0_(.*?)EEv|(pack|mask_state)_kernel"
)
# Cells that are no template argument of their kernels.
FAMILIES = {"bnlstm_": "BnLstm", "projected_": "ProjectedLstm"}
# A layer that runs step by step: its products, and everything pointwise.
STEPS = re.compile(r"(steps_\w+?)_kernelI(.*?)EEv")
# The last template argument: the kernel has regularisers.
REGULARISED = "ELb0ELb1E"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which(str(Path(home, "bin", "nvcc"))) if home else None) or shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton else None
    bundled = [Path(f, "backends", "nvidia", "bin", "cuobjdump") for f in folders or ()]
    return shutil.which("cuobjdump") or next((str(p) for p in bundled if p.exists()), None)


def short(name: str) -> str:
    """Direction, cell, format, tile and exchange of a mangled kernel name."""
    found = STEPS.search(name)
    if found:
        kind, arguments = found.groups()
        numbers = re.findall(r"Li(\d+)E", arguments)
        return " ".join([kind, *WORDS.findall(arguments), f"<{','.join(numbers)}>"])
    found = WANTED.search(name)
    if not found:
        return name
    family, direction, arguments, other = found.groups()
    if other:
        return f"{other} " + name.split("INS0_")[-1].split("EE")[0].lstrip("0123456789")
    numbers = re.findall(r"Li(\d+)E", arguments.split("TileI")[-1])
    words = ([FAMILIES[family]] if family else []) + WORDS.findall(arguments)
    kind = " regularised" if arguments.endswith(REGULARISED) else ""
    return f"{direction} {' '.join(words)} <{','.join(numbers)}>{kind}"


def compile_one(nvcc: str, source: Path, arch: str, out: Path) -> tuple[Path, str, str]:
    out.mkdir(parents=True, exist_ok=True)
    target = out / (source.stem + ".o")
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        f"-I{ROOT / 'csrc'}",
        "-c",
        str(source),
        "-o",
        str(target),
    ]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += ["-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    error = "" if done.returncode == 0 else text[:2000]
    return target, text, error


def judge(text: str) -> tuple[list[str], dict[str, int]]:
    """Complaints about one compilation's kernels, and the registers of each."""
    complaints, registers = [], {}
    for entry in ENTRY.finditer(text):
        name = short(entry["name"])
        registers[name] = int(entry["registers"])
        if int(entry["stack"]) or int(entry["stores"]) or int(entry["loads"]):
            complaints.append(
                f"{name}: {entry['stack']} bytes of local memory, "
                f"{entry['stores']} of spill stores, {entry['loads']} of spill loads"
            )
        if registers[name] > MOST_REGISTERS:
            complaints.append(f"{name}: {registers[name]} registers")
    if not registers:
        complaints.append("ptxas named no kernel")
    return complaints, registers


def products(name: str) -> int:
    """Tensor core instructions of a kernel whose loops over its tile are unrolled."""
    if name.startswith("steps_"):
        number_format = name.split()[1]
        m, n, warps_m, warps_n, warps_k, chunks = map(int, name.split("<")[1].split(",")[:6])
        each = 3 if number_format == "Bf16x3" else 2
        return m // warps_m * (n // warps_n) * (chunks // warps_k) * each
    cell, number_format = name.split()[1:3]
    units, row_tiles, chunks = map(int, name.split("<")[1].rstrip(">").split(",")[:3])
    three = "Gru" in cell or cell == "RhnILb0"
    gates = 4 if cell.endswith("Lstm") else 3 if three else 2 if cell == "RhnILb1" else 1
    if cell == "ProjectedLstm":
        # With the projection; backward has the product over all gates once more behind its loop.
        gates = 9 if name.startswith("backward") else 5
    of_a_chunk = 3 if number_format == "Bf16x3" else 2
    return gates * units // 16 * chunks * row_tiles * of_a_chunk


def inspect(cuobjdump: str, target: Path) -> tuple[list[str], int]:
    """Complaints about machine code, and how many kernels are stubs: not for this architecture."""
    complaints, stubs = [], 0
    dump = subprocess.run([cuobjdump, "-sass", target], capture_output=True, text=True, check=True)
    for part in dump.stdout.split("Function : ")[1:]:
        name = short(part.split("\n", 1)[0])
        if name.startswith(("pack", "mask_state")):
            continue
        if name.startswith("steps_") and not name.startswith("steps_product"):
            if re.search(r"\b(LDL|STL)\b", part):
                complaints.append(f"{name}: local memory in the machine code")
            continue
        if (
            "BPT.TRAP" in part and "HMMA" not in part
        ):  # nothing but a trap: not for this architecture
            stubs += 1
            continue
        found, expected = len(re.findall(r"\bHMMA\.", part)), products(name)
        if found == 0 or found % expected:
            complaints.append(f"{name}: {found} tensor core instructions, {expected} expected")
        if re.search(r"\b(LDL|STL)\b", part):
            complaints.append(f"{name}: local memory in the machine code")
        if "Sentinel" in name and "LDG.E.128.STRONG.GPU" not in part:
            complaints.append(f"{name}: no 16-byte exchange load")
        if "Sentinel" in name and "MEMBAR" in part:
            complaints.append(f"{name}: a fence, which this exchange does without")
        if "Cluster" in name and re.search(r"PHASECHK.*MEMBAR.*HMMA", part, re.DOTALL):
            complaints.append(f"{name}: a fence in every step, between its wait and its products")
    return complaints, stubs


def link(nvcc: str, arch: str, out: Path) -> list[str]:
    """Complaints about the library as a whole: with the launches, is every name defined?"""
    for source in sorted(SOURCES.parent.glob("*.cu")):
        _, _, error = compile_one(nvcc, source, arch, out)
        if error:
            return [error]
    command = [nvcc, "-shared", f"-arch=sm_{arch}", "-Xlinker", "--no-undefined"]
    command += [*map(str, sorted(out.glob("*.o"))), "-o", str(out / "kernels.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [f"not linked: {done.stderr[:2000]}"] if done.returncode else []


def gate(nvcc: str, cuobjdump: str | None, arch: str, only: str, jobs: int, out: Path) -> bool:
    sources = sorted(s for s in SOURCES.glob("*.cu") if only in s.stem)
    if not sources:
        print(f"no source in {SOURCES} has {only!r} in its name")
        return False
    complaints: list[str] = []
    registers: dict[str, int] = {}
    stubs = 0
    start = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        compiled = pool.map(lambda s: compile_one(nvcc, s, arch, out / arch), sources)
        for target, text, error in compiled:
            if error:
                print(error)
                return False
            found, used = judge(text)
            complaints += [f"{target.stem}: {c}" for c in found]
            registers |= used
            if cuobjdump:
                found, more = inspect(cuobjdump, target)
                complaints += found
                stubs += more
    if not only:
        complaints += link(nvcc, arch, out / arch)
    for complaint in complaints:
        print(complaint)
    most = max(registers, key=registers.__getitem__)
    verdict = f"{len(complaints)} complaints" if complaints else "no spill, no local memory"
    looked = "; no cuobjdump, machine code not looked at"
    if cuobjdump:
        looked = f"; machine code looked at, {stubs} kernels not for this architecture"
    print(
        f"sm_{arch}: {len(registers)} kernels, {verdict}, at most {registers[most]} registers "
        f"({most}), {time.monotonic() - start:.0f} s{looked}"
    )
    return not complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="*", default=ARCHITECTURES, help="default: %(default)s")
    parser.add_argument("--only", default="", help="sources with this in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cuobjdump", default=find_cuobjdump(), help="default: PATH's, Triton's")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "cuda_gate")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("No nvcc found (PATH, CUDA_HOME), so the CUDA kernels were not compiled.")
        return 0
    passed = [
        gate(nvcc, options.cuobjdump, arch, options.only, options.jobs, options.out)
        for arch in options.arch
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
