"""The random words behind every mask: known answers, and one value on every path and machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastrnn import ops
from fastrnn.backends import CPU_MISSING
from fastrnn.backends.cpu import random_mask
from fastrnn.reference import philox

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 2, 16), (1, 4, 64), (2, 2, 65), (1, 3, 200), (70, 40, 33)]
CPU = torch.device("cpu")
native = pytest.mark.skipif(bool(CPU_MISSING), reason="needs the native CPU library")

# Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def a_seed(value: int = 0x0123456789ABCDEF) -> Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    c, k = [torch.tensor(v) for v in counter], [torch.tensor(v) for v in key]
    assert [int(w) for w in philox.philox4x32(tuple(c), tuple(k))] == answer


def test_counters_of_the_words() -> None:
    """Word u of row (t, n): counter (u // 64 * 16 + u % 16, n, t, stream), word u // 16 % 4."""
    seed, stream = 0x0123456789ABCDEF, 0x321
    drawn = philox.words(a_seed(seed), stream, 3, 4, 150, CPU)
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32))
    for t, n, u in [(0, 0, 0), (2, 1, 17), (1, 3, 63), (2, 2, 64), (0, 3, 149)]:
        counter = [torch.tensor(v) for v in (u // 64 * 16 + u % 16, n, t, stream)]
        assert drawn[t, n, u] == philox.philox4x32(tuple(counter), key)[u // 16 % 4]


@native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_words_and_masks(shape: tuple[int, int, int]) -> None:
    """Every instruction set and thread count gives the words of the integer arithmetic."""
    from fastrnn import _cpu

    before = _cpu.isa()
    for value in (0x0123456789ABCDEF, -1, 7):
        seed = a_seed(value)
        expected = philox.words(seed, 0x321, *shape, CPU)
        assert expected.min() >= 0
        assert expected.max() < 1 << 32
        for isa in _cpu.isas():
            _cpu.select_isa(isa)
            for threads in (1, 3):
                words = torch.empty(shape, dtype=torch.int32)
                keep = torch.empty(shape, dtype=torch.bool)
                _cpu.random(
                    seed.data_ptr(), 0x321, philox.threshold(0.3), *shape, threads,
                    words.data_ptr(), keep.data_ptr(),
                )  # fmt: skip
                assert torch.equal(words.long() & 0xFFFFFFFF, expected)
                assert torch.equal(keep, philox.keep(seed, 0x321, 0.3, *shape, CPU))
        _cpu.select_isa(before)


@pytest.mark.parametrize("draw", [random_mask, ops.random_mask], ids=["backend", "operator"])
def test_masks(draw: Callable[..., Tensor], set_threads: Callable[[int], None]) -> None:
    for p in (0.0, 1e-12, 0.1, 0.5, 1.0):
        expected = philox.keep(a_seed(), 5, p, 7, 30, 100, CPU)
        for threads in (1, 2):
            set_threads(threads)
            got = draw(a_seed(), 5, p, 7, 30, 100)
            assert got.dtype == torch.bool
            assert torch.equal(got, expected)
        assert p not in (0.0, 1.0) or expected.all() == expected.any() == (p == 0)


def test_thresholds() -> None:
    assert [philox.threshold(p) for p in (0, 0.5, 1)] == [0, 1 << 31, 1 << 32]
    assert philox.threshold(2**-40) == 0
    assert philox.threshold(1 - 2**-40) == 1 << 32


def test_operator_under_compile() -> None:
    def draw(seed: Tensor, x: Tensor) -> Tensor:
        return x * ops.random_mask(seed, 3, 0.4, x.size(0), x.size(1), x.size(2))

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (3, 5):
        x = torch.ones(steps, 4, 20)
        assert torch.equal(compiled(a_seed(), x), draw(a_seed(), x))


def test_operator_under_vmap() -> None:
    """Plain torch takes over where a transform has to see into it."""
    seeds = torch.tensor([[1], [2]])
    got = torch.func.vmap(lambda s: ops.random_mask(s, 3, 0.4, 2, 3, 20))(seeds)
    for seed, mask in zip(seeds, got, strict=True):
        assert torch.equal(mask, ops.random_mask(seed, 3, 0.4, 2, 3, 20))
    assert not torch.equal(got[0], got[1])
