"""The one rule that says when a result is right.

    max|got - ref64|  <=  K[dtype] * max|same - ref64|  +  FLOOR[dtype] * eps(dtype) * scale

``ref64`` is fastrnn.reference in float64 on the very same (already rounded) inputs, ``same`` is
the reference (or torch.nn) at the dtype under test, ``scale`` is max(1, max|ref64|). Errors are
maxima over a whole tensor. No test has a number of its own.

K. Two correct programs that round in a different order differ in error by a small factor.
  float32: 4. Our tanh has an absolute error of 1.5e-7 where torch's has 3e-8; everything else
  rounds alike, and the recurrence carries both errors in the same way.
  bfloat16: 2. The reference rounds every intermediate, the kernels accumulate in float32 and keep
  the cell state there: they should do better, and the factor only covers luck of the draw.
  float64: 4, as float32, where ``same`` is one of the draws below. Else there is nothing better to
  compare with: ``same`` is the truth itself, and the floor alone has to do.
FLOOR, in units of eps(dtype) = the spacing of numbers at 1.
  It covers tensors so small that ``same`` is exact by luck, and cancellation: test data are of
  unit scale (weights below 1/sqrt(H), upstream gradients N(0, 1)), so one rounding of an
  intermediate of size 1 costs eps even when the result is far below 1; hence the 1 in ``scale``.
  float32 and bfloat16: 16 and 4, a handful of roundings. float64: 512, a hundred rounded steps
  on both sides, still 1e-13.
Layer norm divides by a spread, step after step: a tensor's error is one draw of roundings, many
  times enlarged. Over 1800 tensors of layer-normalised LSTMs (19 and 11 steps) the quotient of
  our error and the reference's had the median 1.00, 45 were above 4 and 46 below 1/4: luck on
  either side. So ``same`` is there the worst of four draws: the reference, and three times with
  its inputs moved by at most a spacing. In float64 it is the three: a row that a mask has left
  with next to no spread turned a spacing of its input into 1e-11 of its gradient.
Formats. The CUDA kernels multiply float32 in a format that torch has no dtype for: operands are
  rounded and sums are not, as with 16 bits, so K and FLOOR are those of the 16-bit types and eps is
  the format's; ``same`` is the float32 reference on rounded weights (tests/formats.py).
  Beyond it is a layer norm over a state of one value (proj_size=1): the gradient of that value is
  the rest of sums that cancel, and shows how the gradients of the gates were rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

K = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
FLOOR = {torch.float64: 512.0, torch.float32: 16.0, torch.bfloat16: 4.0, torch.float16: 4.0}
FORMATS = {"tf32": 2.0**-10, "bf16x3": 2.0**-16}  # the spacing of numbers at 1


def allowed_error(
    ref64: Tensor,
    same_dtype: Tensor,
    dtype: torch.dtype | None = None,
    number_format: str = "",
) -> float:
    """The right-hand side of the rule; ``dtype`` is the dtype under test (same_dtype's)."""
    dtype = torch.bfloat16 if number_format else dtype or same_dtype.dtype
    eps = FORMATS[number_format] if number_format else torch.finfo(dtype).eps
    scale = max(1.0, _largest(ref64))
    return K[dtype] * _largest(same_dtype.double() - ref64) + FLOOR[dtype] * eps * scale


def moved_values(values: Tensor, generator: torch.Generator) -> Tensor:
    """A third of the values as they are, a third those just above, a third those just below."""
    way = torch.randint(-1, 2, values.shape, generator=generator)
    return torch.where(way == 0, values, values.nextafter(way.to(values.dtype) * torch.inf))


def worst_of(runs: list[dict[str, Tensor]], ref64: dict[str, Tensor]) -> dict[str, Tensor]:
    """For each tensor the run that is farthest from the truth."""
    return {
        name: max((run[name] for run in runs), key=lambda t: _largest(t.detach().double() - truth))
        for name, truth in ref64.items()
    }


def assert_close_by_rule(
    name: str,
    got: Tensor,
    ref64: Tensor,
    same_dtype: Tensor,
    dtype: torch.dtype | None = None,
    number_format: str = "",
) -> None:
    """Apply the rule to one tensor.

    Args:
        name: what the tensor is, for the message.
        got: the result under test.
        ref64: ground truth, float64, the same shape.
        same_dtype: the reference at the dtype under test, the same shape.
        dtype: the dtype under test, where it is not that of ``same_dtype``.
        number_format: of FORMATS, where one is under test.

    Raises:
        AssertionError: wrong shape, a value that is not finite, or an error beyond the rule.
    """
    assert ref64.dtype == torch.float64, f"{name}: the ground truth is {ref64.dtype}"
    assert got.shape == ref64.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(ref64.shape)}"
    if got.numel() == 0:
        return
    got = got.detach().double()
    finite = torch.isfinite(got)
    assert finite.all(), f"{name}: {int((~finite).sum())} of {got.numel()} values are not finite"
    error = (got - ref64.detach()).abs()
    allowed = allowed_error(ref64.detach(), same_dtype.detach(), dtype, number_format)
    worst = _largest(error)
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert worst <= allowed, (
        f"{name}: error {worst:.3g} > {allowed:.3g} allowed at {where}: "
        f"got {got[where]:.9g}, expected {ref64[where]:.9g}; "
        f"{int((error > allowed).sum())} of {error.numel()} values beyond the rule"
    )


def assert_half_the_digits(
    name: str, got: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64
) -> None:
    """For what is an approximation by nature (finite differences, tangents, a dtype's sanity).

    max|got - expected| <= sqrt(eps(dtype)) * max|expected|: half of the digits, no more is meant.
    """
    worst = _largest(got.detach().double() - expected.detach().double())
    allowed = torch.finfo(dtype).eps ** 0.5 * _largest(expected)
    assert worst <= allowed, f"{name}: error {worst:.3g} > {allowed:.3g} allowed"


def assert_same_bits(name: str, a: Tensor, b: Tensor) -> None:
    """Equal shape, dtype and every bit (NaN equals NaN, +0 differs from -0)."""
    assert a.shape == b.shape, f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert a.dtype == b.dtype, f"{name}: dtypes {a.dtype} and {b.dtype}"
    if a.numel() == 0:
        return
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    differ = a.detach().contiguous().view(words) != b.detach().contiguous().view(words)
    first = tuple(int(i) for i in differ.nonzero()[0]) if differ.any() else ()
    assert not differ.any(), (
        f"{name}: {int(differ.sum())} of {a.numel()} values differ in their bits, "
        f"first at {first}: {a[first]:.9g} and {b[first]:.9g}"
    )


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0
