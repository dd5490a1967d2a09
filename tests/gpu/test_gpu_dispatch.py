"""What a GPU runs unasked: a kernel that fails its trial is a warning, and so a failure here."""

from __future__ import annotations

import pytest
import torch

import fastrnn
from fastrnn.gpu import choice
from tests.gpu.on_gpu import settle
from tests.gpu.test_gpu_modules import MODULES, I, N, T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_unasked(name: str, dtype: torch.dtype) -> None:
    """Every family passes its trial, and then runs without one."""
    choice.forget()
    module = MODULES[name](device="cuda", dtype=dtype)
    x = torch.randn(T, N, I, device="cuda", dtype=dtype)
    lengths = torch.tensor([T, 2, 4, 1, T], device="cuda")
    found = fastrnn.explain(module, x, lengths=lengths)
    torch.manual_seed(5)
    y, _ = module(x, lengths=lengths)
    y.float().square().sum().backward()
    settle()
    after = fastrnn.explain(module, x, lengths=lengths)
    assert after.backend == found.backend, after
    if found.backend in ("cuda", "triton"):
        assert "tried" in found.reason
        assert "tried" not in after.reason
        torch.manual_seed(5)
        with fastrnn.use_backend(found.backend):
            assert torch.equal(module(x, lengths=lengths)[0], y)


def test_a_captured_call_takes_what_was_tried_before() -> None:
    choice.forget()
    rnn = fastrnn.RHN(I, 40, depth=2, device="cuda")
    x = torch.randn(64, N, I, device="cuda")
    with torch.no_grad():
        expected = rnn(x)[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            rnn(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = rnn(x)[0]
        graph.replay()
    settle()
    assert torch.equal(y, expected)
