"""The promises around the kernels: the same bits, streams, graphs, memory, devices."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

import fastrnn
from tests.gpu.on_gpu import moved, multiplied_as, same_bits, settle, solve
from tests.problems import PLAIN, Case, Problem, forward
from tests.tolerances import assert_same_bits

REPEATS = 100


@pytest.mark.parametrize("exchange", ["", ",sentinel", ",flags"])
@pytest.mark.parametrize("cell", PLAIN)
def test_the_same_bits_a_hundred_times(cell: str, exchange: str) -> None:
    """Nothing is added atomically, so any drift is a race."""
    if exchange == ",flags" and cell != "lstm":
        pytest.skip("the flags exchange is compiled for LSTM only, to compare with")
    case = Case(cell, torch.bfloat16, T=40, N=17, H=333, plan=f"cuda{exchange}")
    p = moved(Problem(case))
    expected = solve(p)
    for _ in range(REPEATS):
        same_bits(solve(p), expected)
    settle()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_same_bits_beside_other_work(cell: str) -> None:
    """Another stream keeps the device busy: schedules change, results do not."""
    p = moved(Problem(Case(cell, torch.float16, T=30, N=9, H=512, plan="cuda")))
    expected = solve(p)
    torch.cuda.synchronize()
    other, a = torch.cuda.Stream(), torch.randn(1024, 1024, device="cuda")
    for _ in range(10):
        with torch.cuda.stream(other):
            for _ in range(5):
                a = torch.mm(a, a).clamp_(-1, 1)
        same_bits(solve(p), expected)
    settle()


@pytest.mark.parametrize("cell", PLAIN)
def test_a_stream_of_ones_own(cell: str) -> None:
    """The call is ordered on the current stream: its input is still being made when it is made."""
    p = moved(Problem(Case(cell, torch.bfloat16, T=20, N=8, H=256, plan="cuda")))
    expected = solve(p)
    clean = p.x.clone()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        p.x = torch.full_like(clean, 5.0)
        torch.cuda._sleep(20_000_000)  # some ten milliseconds
        p.x.copy_(clean)
        got = solve(p)
    stream.synchronize()
    same_bits(got, expected)


@pytest.mark.parametrize("exchange", ["", ",flags"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_captured_and_replayed(cell: str, exchange: str) -> None:
    """A graph holds the mail's fill too: replays with other input give that input's results."""
    if exchange and cell != "lstm":
        pytest.skip("the flags exchange is compiled for LSTM only, to compare with")
    p = moved(Problem(Case(cell, torch.bfloat16, T=12, N=9, H=320, plan=f"cuda{exchange}")))
    clean = p.x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = forward(p, return_cells=False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(p, return_cells=False)
    for scale in (0.0, 1.0, 1.0):
        p.x.copy_(clean * scale)
        graph.replay()
        torch.cuda.synchronize()
        if scale:
            assert_same_bits("y", captured["y"], expected["y"])
            assert_same_bits("h_n", captured["h_n"], expected["h_n"])
        else:
            assert not torch.equal(captured["y"], expected["y"])
    settle()


def test_a_training_step_in_a_graph() -> None:
    rnn = fastrnn.LSTM(16, 256, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(10, 8, 16, device="cuda", dtype=torch.bfloat16)

    def gradients() -> tuple[torch.Tensor, ...]:
        y, _ = rnn(x)
        return torch.autograd.grad(y.float().square().sum(), list(rnn.parameters()))

    with fastrnn.use_backend("cuda"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                expected = gradients()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients()
    for _ in range(3):
        graph.replay()
    settle()
    for index, (got, wanted) in enumerate(zip(captured, expected, strict=True)):
        assert_same_bits(f"gradient {index}", got, wanted)


def test_memory_is_torchs_and_comes_back() -> None:
    """The library takes nothing from the driver, and a call leaves nothing behind."""
    p = moved(Problem(Case("lstm", torch.bfloat16, T=64, N=32, H=512, plan="cuda")))
    solve(p)
    settle()
    gc.collect()
    torch.cuda.empty_cache()
    held, (free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    for _ in range(20):
        solve(p)
    settle()
    gc.collect()
    assert torch.cuda.memory_allocated() == held
    torch.cuda.empty_cache()
    taken = free - torch.cuda.mem_get_info()[0]
    grown = torch.cuda.memory_reserved() - reserved
    assert taken <= max(grown, 0) + (8 << 20), f"{taken} bytes taken beside torch's {grown}"


def test_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    case = Case("gru", torch.bfloat16, T=9, N=9, H=300, plan="cuda")
    expected = solve(moved(Problem(case), "cuda:0"))
    with torch.cuda.device(0):  # the current one stays the current one
        got = solve(moved(Problem(case), "cuda:1"))
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    for key, value in got.items():
        assert value.device.index in (1, None) or not value.numel()
        assert_same_bits(key, value.cpu(), expected[key].cpu())


def test_the_modules_precision_switch() -> None:
    """bf16x3 is closer to the truth than TF32."""
    p = Problem(Case("lstm", T=8, N=5, H=200, upstream=("y",), plan="cuda"))
    errors = []
    reference = fastrnn.reference.lstm_layer(
        p.x.double(), p.h0[0].double(), p.c0[0].double(), [w.double() for w in p.weights]
    )[0]
    for name in ("tf32", "bf16x3"):
        with multiplied_as(name):
            y = forward(moved(p))["y"].cpu().double()
        errors.append(float((y - reference).abs().max()))
    assert 0 < errors[1] < errors[0] / 4, errors


def test_no_call_waits_for_the_device() -> None:
    """A long kernel is under way, and the host is through with the call long before it."""
    p = moved(Problem(Case("lstm", torch.bfloat16, T=20, N=8, H=256, plan="cuda")))
    solve(p)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    solve(p)
    done.record()
    assert not done.query()
    settle()


@pytest.mark.parametrize("kind", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_by_torchs_kernels(kind: type[torch.nn.RNNBase]) -> None:
    """Weights in one piece, as cuDNN wants them, and a backward in eval() as well."""
    rnn = kind(16, 32).to("cuda").eval()
    x = torch.randn(5, 3, 16, device="cuda", requires_grad=True)
    with warnings.catch_warnings(), fastrnn.use_backend("torch"):
        warnings.simplefilter("error")
        rnn(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_lengths_and_masks_in_a_graph(backend: str) -> None:
    rnn = fastrnn.LSTM(16, 32, recurrent_dropout=0.3, weight_dropout=0.3, device="cuda")
    x = torch.randn(9, 4, 16, device="cuda")
    lengths = torch.tensor([9, 2, 5, 1], device="cuda")
    with fastrnn.use_backend(backend), torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            rnn(x, lengths=lengths)
        torch.cuda.current_stream().wait_stream(stream)
        torch.manual_seed(3)
        expected = rnn(x, lengths=lengths)[0]
        graph = torch.cuda.CUDAGraph()
        torch.manual_seed(3)
        with torch.cuda.graph(graph):
            captured = rnn(x, lengths=lengths)[0]
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits("y", captured, expected)
