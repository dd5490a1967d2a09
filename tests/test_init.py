"""fastrnn.init: eigenvalues and singular values are what the papers promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn import init
from tests.tolerances import FLOOR

ALL: list[Callable[..., Tensor]] = [
    init.identity_,
    init.np_rnn_,
    init.orthogonal_gates_,
    init.unitary_,
]
RANDOM = ALL[1:]


def near(got: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of float64 sums."""
    allowed = FLOOR[torch.float64] * torch.finfo(torch.float64).eps
    assert (got - expected).abs().max() <= allowed


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def blocks(weight: Tensor) -> list[Tensor]:
    return list(weight.detach().split(weight.size(1)))


@pytest.mark.parametrize("gates", [1, 3, 4])
@pytest.mark.parametrize("fill", ALL, ids=lambda f: f.__name__)
def test_fills_every_block_in_place(fill: Callable[..., Tensor], gates: int) -> None:
    weight = torch.nn.Parameter(torch.full((gates * 10, 10), torch.nan))
    before = weight.data_ptr()
    assert fill(weight) is weight
    assert weight.data_ptr() == before
    assert weight.grad_fn is None
    assert weight.isfinite().all()
    drawn = blocks(weight)
    for other in drawn[1:]:
        assert torch.equal(drawn[0], other) == (fill is init.identity_)


@pytest.mark.parametrize("gates", [1, 4])
def test_identity(gates: int) -> None:
    for block in blocks(init.identity_(torch.empty(gates * 7, 7), gain=0.5)):
        assert torch.equal(block, 0.5 * torch.eye(7))
    block = init.identity_(torch.empty(3, 3, dtype=torch.float64), gain=0.9)
    assert torch.equal(block, 0.9 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 50])
def test_np_rnn(size: int) -> None:
    for block in blocks(init.np_rnn_(torch.empty(2 * size, size, dtype=torch.float64))):
        near(block, block.T)
        values = torch.linalg.eigvalsh(block)
        near(values[-1], torch.ones(()).double())
        assert values[0] > 0
        # lambda_min(A) >= 0, so the smallest is at least 1 / e, and e = 1 + lambda_max(A).
        assert values[0] >= 1 / (1 + 16)


@pytest.mark.parametrize("size", [1, 2, 33])
def test_orthogonal_gates(size: int) -> None:
    weight = init.orthogonal_gates_(torch.empty(4 * size, size, dtype=torch.float64), gain=2.0)
    for block in blocks(weight):
        near(torch.linalg.svdvals(block), torch.full((size,), 2.0).double())


@pytest.mark.parametrize("shape", [(12, 2), (12, 5)])
def test_orthogonal_gates_of_a_projection(shape: tuple[int, int]) -> None:
    weight = init.orthogonal_gates_(torch.empty(shape, dtype=torch.float64), gates=4)
    for block in weight.split(3):
        near(torch.linalg.svdvals(block), torch.ones(min(block.shape)).double())


@pytest.mark.parametrize("size", [2, 4, 46])
def test_unitary(size: int) -> None:
    half = size // 2
    for block in blocks(init.unitary_(torch.empty(2 * size, size, dtype=torch.float64))):
        near(torch.linalg.svdvals(block), torch.ones(size).double())
        near(torch.linalg.eigvals(block).abs(), torch.ones(size).double())
        # The real form of a complex matrix: it commutes with multiplication by i.
        near(block[:half, :half], block[half:, half:])
        near(block[:half, half:], -block[half:, :half])
        assert half == 1 or block[:half, half:].abs().max() > 1e-3


def test_orthogonal_gates_are_uniform() -> None:
    """Without the signs of R the first value of every matrix has one sign."""
    weight = init.orthogonal_gates_(torch.empty(64 * 4, 4), generator=seeded())
    assert 16 < int((weight[::4, 0] > 0).sum()) < 48


def test_unitary_is_the_product_of_the_paper() -> None:
    """D3 R2 F* D2 P R1 F D1, drawn in that order."""
    half = 6
    draw = seeded()

    def diagonal() -> Tensor:
        angle = (2 * torch.rand(half, generator=draw, dtype=torch.float64) - 1) * math.pi
        return torch.diag(torch.polar(torch.ones_like(angle), angle))

    def reflection() -> Tensor:
        v = torch.view_as_complex(torch.randn(half, 2, generator=draw, dtype=torch.float64))[
            :, None
        ]
        return torch.eye(half) - 2 * v @ v.mH / (v.mH @ v).real

    k = torch.arange(half, dtype=torch.float64)
    fourier = torch.exp(-2j * math.pi * torch.outer(k, k) / half) / half**0.5
    d1, r1 = diagonal(), reflection()
    p = torch.eye(half, dtype=torch.complex128)[torch.randperm(half, generator=draw)]
    d2, d3, r2 = diagonal(), diagonal(), reflection()
    w = d3 @ r2 @ fourier.mH @ d2 @ p @ r1 @ fourier @ d1
    expected = torch.cat([torch.cat([w.real, -w.imag], 1), torch.cat([w.imag, w.real], 1)])
    near(init.unitary_(torch.empty(12, 12, dtype=torch.float64), seeded()), expected)


@pytest.mark.parametrize("fill", RANDOM, ids=lambda f: f.__name__)
def test_generator(fill: Callable[..., Tensor]) -> None:
    """One seed, one matrix; torch's own generator is left alone when another is given."""
    before = torch.get_rng_state()
    drawn = [
        fill(torch.empty(6, 6), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("fill", ALL, ids=lambda f: f.__name__)
def test_lower_precision(fill: Callable[..., Tensor]) -> None:
    module = fastrnn.GRU(3, 6, dtype=torch.bfloat16)
    fill(module.weight_hh_l0)
    assert module.weight_hh_l0.isfinite().all()


@pytest.mark.parametrize("fill", ALL, ids=lambda f: f.__name__)
def test_an_rhn_is_filled_level_by_level(fill: Callable[..., Tensor]) -> None:
    module = fastrnn.RHN(3, 4, depth=3)
    with pytest.raises(
        ValueError, match=r"got shape \(3, 8, 4\).* fill each of `weight.detach\(\)`"
    ):
        fill(module.weight_hh_l0)
    with torch.no_grad():
        module.weight_hh_l0.fill_(torch.nan)
    for level in module.weight_hh_l0.detach():
        fill(level)
    module(torch.randn(2, 1, 3))[0].sum().backward()
    assert module.weight_hh_l0.isfinite().all()
    assert module.weight_hh_l0.grad.isfinite().all()


@pytest.mark.parametrize("fill", ALL, ids=lambda f: f.__name__)
def test_errors(fill: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=rf"{fill.__name__}: weight: got shape \(7, 2\), expected"):
        fill(torch.empty(7, 2))
    with pytest.raises(ValueError, match=r"got shape \(4,\), expected"):
        fill(torch.empty(4))
    with pytest.raises(TypeError, match=r"weight: got torch.int64, expected a floating"):
        fill(torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="weight: got list"):
        fill([[1.0]])
    assert fill(torch.ones(4, 2)).shape == (4, 2)


def test_errors_of_shapes() -> None:
    with pytest.raises(ValueError, match="got 3 columns, expected an even number"):
        init.unitary_(torch.empty(6, 3))
    with pytest.raises(ValueError, match=r"got shape \(6, 2\) for 4 gates"):
        init.orthogonal_gates_(torch.empty(6, 2), gates=4)


def test_gates_that_cannot_be_counted() -> None:
    weight, before = torch.ones(6, 2), torch.get_rng_state()
    for bad in (2.0, True, "2"):
        got = rf"got {bad!r} \({type(bad).__name__}\)"
        with pytest.raises(TypeError, match=f"orthogonal_gates_: gates: {got}, expected an int"):
            init.orthogonal_gates_(weight, gates=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="orthogonal_gates_: gates: got -1, expected at least 1"):
        init.orthogonal_gates_(weight, gates=-1)
    assert bool((weight == 1).all())
    assert torch.equal(torch.get_rng_state(), before)
