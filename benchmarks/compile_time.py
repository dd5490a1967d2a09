"""How long torch.compile takes for one training step of a long LSTM, ours and torch.nn's.

    python -m benchmarks.compile_time --steps 1000 --timeout 1800

Each contestant compiles in a process of its own, fullgraph, without caches. "compile" is the first
training step less the second. torch.nn's LSTM breaks the graph unless allow_rnn is set; then it is
unrolled, a node for every operation of every step. Reported, never a test: docs/benchmarks.md says
what else disturbs a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

CONTESTANTS = ("fastrnn", "torch")
RESULT = "compile time: "
# As a traceback ends, and as dynamo cites one: a class, with or without its module.
EXCEPTION = re.compile(r"(\w+\.)*[A-Z]\w*(: |$)")


def measure(contestant: str, steps: int, batch: int, hidden: int, backend: str) -> dict[str, Any]:
    """One contestant in this process: seconds of the first and the second training step."""
    import torch

    import fastrnn

    torch.manual_seed(0)
    make = fastrnn.LSTM if contestant == "fastrnn" else torch.nn.LSTM
    module = make(hidden, hidden)
    nodes = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal nodes
        nodes += len(graph.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(module, fullgraph=True, backend=count)
    x = torch.randn(steps, batch, hidden, requires_grad=True)
    seconds = []
    with torch._dynamo.config.patch(allow_rnn=True):
        for _ in range(2):
            start = time.perf_counter()
            compiled(x)[0].sum().backward()
            seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "second": seconds[1], "nodes": nodes}


def in_a_process(contestant: str, options: argparse.Namespace) -> dict[str, Any]:
    """``measure`` in a fresh process with empty caches; {"timeout": seconds} if it took longer."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.compile_time", "--contestant", contestant]
        for name in ("steps", "batch", "hidden", "backend"):
            command += [f"--{name}", str(getattr(options, name))]
        off = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **off},
                capture_output=True,
                text=True,
                timeout=options.timeout,
            )
        except subprocess.TimeoutExpired:
            return {"timeout": options.timeout}
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not lines:
        return {"error": failure(done.stderr, done.returncode)}
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
    return found


def failure(stderr: str, status: int) -> str:
    """The last exception that was reported: dynamo's hints come after it."""
    lines = stderr.strip().splitlines() or [f"no result, exit status {status}"]
    return next((each for each in reversed(lines) if EXCEPTION.match(each)), lines[-1])


def line(contestant: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in found:
        return f"| {contestant} | failed: {found['error']} | | |"
    if "timeout" in found:
        return f"| {contestant} | more than {found['timeout']:g} s | | |"
    compile_seconds = found["first"] - found["second"]
    return (
        f"| {contestant} | {compile_seconds:.1f} s | {found['second'] * 1e3:.0f} ms "
        f"| {found['nodes']} |"
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if fastrnn's own step could not be compiled in time."""
    it = argparse.ArgumentParser("python -m benchmarks.compile_time", description=__doc__)
    it.add_argument("--steps", type=int, default=1000)
    it.add_argument("--batch", type=int, default=8)
    it.add_argument("--hidden", type=int, default=128)
    it.add_argument("--backend", default="inductor")
    it.add_argument("--timeout", type=float, default=1800.0, help="seconds for each contestant")
    it.add_argument("--only", choices=CONTESTANTS)
    it.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = it.parse_args(arguments)
    for name in ("steps", "batch", "hidden"):
        if getattr(options, name) < 1:
            it.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    if not options.timeout > 0:
        it.error(f"--timeout is {options.timeout}; expected a number above 0")
    if options.contestant:
        shape = (options.steps, options.batch, options.hidden)
        print(RESULT + json.dumps(measure(options.contestant, *shape, options.backend)))
        return 0
    print(f"T={options.steps} N={options.batch} H={options.hidden}, {options.backend}\n")
    print("| LSTM of | compile | a step then | nodes in the graph |\n|---|---|---|---|")
    results = {}
    for contestant in CONTESTANTS if options.only is None else (options.only,):
        results[contestant] = in_a_process(contestant, options)
        print(line(contestant, results[contestant]), flush=True)
    return 0 if "first" in results.get("fastrnn", {"first": 0}) else 1


if __name__ == "__main__":
    sys.exit(main())
