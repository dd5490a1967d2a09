"""torch.compile, torch.export, DDP: the module as a citizen of a larger program.

The compile tests use the aot_eager backend, which traces forward and backward like the default one
and skips generating C++ code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dropin_cases import Kind, assert_same_bits, outcome, random_state, results, tensors, twins
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.versions import exporting

# dynamo makes an instance of every autograd.Function that it traces, and torch warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture
def counter() -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}]
)
def test_compiled_training_with_several_lengths(
    any_kind: Kind, options: dict, counter: Any
) -> None:
    """One whole graph, forward and backward, equal results, no new compilation for a new T."""
    ours, _ = twins(any_kind, 5, 7, **options)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for steps in (6, 9, 4):
        shape = (3, steps, 5) if ours.batch_first else (steps, 3, 5)
        x, hx = torch.randn(shape), random_state(ours, 3)
        expected = outcome(ours, x, hx)
        found = outcome(compiled, x, hx)
        assert {n.replace("_orig_mod.", "") for n in found} == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name.replace("_orig_mod.", "")])
        frames.append(counter.frame_count)
    # Not always 1: dynamo may call its backend again while it settles which sizes are dynamic.
    assert len(set(frames)) == 1, f"a new length was compiled anew: {frames}"


def test_compiled_inference(any_kind: Kind, counter: Any) -> None:
    ours, _ = twins(any_kind, 5, 7, num_layers=2)
    compiled = torch.compile(ours.eval(), fullgraph=True, dynamic=True, backend=counter)
    for steps in (6, 9):
        x = torch.randn(steps, 3, 5)
        for name, value in results(compiled, x).items():
            torch.testing.assert_close(value, results(ours, x)[name])
    assert counter.frame_count == 1


def test_compiled_method(any_kind: Kind, counter: Any) -> None:
    """module.compile() compiles in place; the state_dict keeps its names."""
    ours, theirs = twins(any_kind, 5, 7)
    x = torch.randn(6, 3, 5)
    expected = results(ours, x)
    ours.compile(fullgraph=True, backend=counter)
    for name, value in results(ours, x).items():
        torch.testing.assert_close(value, expected[name])
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_compiled_cell(cell: Kind, counter: Any) -> None:
    ours, _ = twins(cell, 5, 7)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 5):
        x = torch.randn(rows, 5)
        expected = outcome(ours, x)
        for name, value in outcome(compiled, x).items():
            torch.testing.assert_close(value, expected[name.replace("_orig_mod.", "")])
    assert counter.frame_count == 1


def test_export_with_dynamic_length(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 5, 7, num_layers=2)
    steps = torch.export.Dim("steps", min=2, max=64)
    with exporting():
        program = torch.export.export(
            ours.eval(), (torch.randn(6, 3, 5),), dynamic_shapes=({0: steps},)
        )
    for length in (6, 11):
        x = torch.randn(length, 3, 5)
        for mine, other in zip(tensors(program.module()(x)), tensors(ours(x)), strict=True):
            torch.testing.assert_close(mine, other)
    assert len(list(program.graph.nodes)) < 200, "the graph was unrolled over the steps"


def test_fake_tensors_have_the_real_shapes(any_kind: Kind) -> None:
    ours, _ = twins(any_kind, 5, 7, num_layers=2, bidirectional=True)
    real = tensors(ours(torch.randn(4, 3, 5)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = tensors(ours(mode.from_tensor(torch.randn(4, 3, 5))))
    for mine, other in zip(fake, real, strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "hx"])
def test_symbolic_trace(any_kind: Kind, with_state: bool) -> None:
    """One node of the graph of torch.fx, as a module of torch.nn."""
    check_symbolic_trace(*twins(any_kind, 5, 7), torch.randn(6, 3, 5), with_state)


def test_symbolic_trace_of_a_cell(cell: Kind) -> None:
    check_symbolic_trace(*twins(cell, 5, 7), torch.randn(3, 5), False)


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})

    def forward(self, x: Any, hx: Any = None) -> Any:
        layer = self.inner["layer"]
        return layer(x.relu()) if hx is None else layer(x.relu(), hx)


def check_symbolic_trace(ours: Any, theirs: Any, x: Any, with_state: bool) -> None:
    state = random_state(ours, 3) if with_state else None
    concrete = None if with_state else {"hx": None}
    nodes = []
    for module in (ours, theirs):
        graph = torch.fx.symbolic_trace(Around(module), concrete)
        nodes.append([(n.op, str(n.target), n.kwargs) for n in graph.graph.nodes])
        arguments = (x.clone(), state)
        assert_same_bits(results(graph, *arguments), results(Around(module), *arguments))
    assert nodes[0] == nodes[1]


def test_distributed_data_parallel(any_kind: Kind, tmp_path: Path) -> None:
    """A group of one process: hooks of DDP fire, gradients and buckets are those of the module."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    ours, _ = twins(any_kind, 5, 7, num_layers=2, bidirectional=True)
    x = torch.randn(6, 3, 5)
    expected = outcome(ours, x)
    ours.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ours)
        found = {n.replace("module.", ""): v for n, v in outcome(wrapped, x).items()}
        # Its reducer would end the group with the GIL held, for which a thread of gloo may wait.
        del wrapped
    finally:
        dist.destroy_process_group()
    assert_same_bits(found, expected)
