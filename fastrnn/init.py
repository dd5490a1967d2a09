"""Initial values for weight_hh, in place, as in ``torch.nn.init``.

A recurrent matrix of G gates is G blocks of H rows: (G*H, H), or (G*H, P) with a projection. Every
function fills each block by itself, without recording gradients, and returns the tensor. Draws come
from ``generator``, or from torch's default one. An RHN has such a matrix for each micro-step: fill
them one by one, ``for level in rhn.weight_hh_l0.detach(): orthogonal_gates_(level)``.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from fastrnn.functional.checks import check_count

__all__ = ["identity_", "np_rnn_", "orthogonal_gates_", "unitary_"]


def identity_(weight: Tensor, gain: float = 1.0) -> Tensor:
    """gain * I in every block: the IRNN of Le, Jaitly and Hinton (arXiv:1504.00941), made for relu.

    Args:
        weight: (G*H, H).
        gain: the diagonal; below 1 the network forgets from the start.

    Raises:
        TypeError: ``weight`` is no floating-point tensor.
        ValueError: its rows are not a multiple of its columns.
    """
    blocks = _blocks("identity_", weight)
    with torch.no_grad():
        blocks.copy_(_eye(weight.size(1)).mul_(gain).expand(blocks.shape))
    return weight


def np_rnn_(weight: Tensor, generator: Generator | None = None) -> Tensor:
    """(A + I) / e with A = R^T R / H, R ~ N(0, 1) and e = lambda_max(A + I), in every block.

    Symmetric and positive definite with its largest eigenvalue at 1: the np-RNN of Talathi and
    Vartak (arXiv:1511.03771), made for relu.

    Args:
        weight: (G*H, H).

    Raises:
        TypeError: ``weight`` is no floating-point tensor.
        ValueError: its rows are not a multiple of its columns.
    """
    blocks = _blocks("np_rnn_", weight)
    size = weight.size(1)
    with torch.no_grad():
        for block in blocks.unbind(0):
            r = _normal((size, size), generator)
            a = r.T @ r / size + _eye(size, generator)
            block.copy_(a / torch.linalg.eigvalsh(a)[-1])
    return weight


def orthogonal_gates_(
    weight: Tensor,
    gain: float = 1.0,
    gates: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """A random (semi-)orthogonal matrix times gain in every block, uniform under the Haar measure.

    ``torch.nn.init.orthogonal_`` on the whole matrix makes its columns orthonormal across all
    gates, so that each gate's own block shrinks every state; here each block keeps all lengths.

    Args:
        weight: (G*H, H), or (G*H, P).
        gates: G; None: rows divided by columns. Needed where the blocks are not square.

    Raises:
        TypeError: ``weight`` is no floating-point tensor.
        ValueError: its rows cannot be divided into so many blocks.
    """
    blocks = _blocks("orthogonal_gates_", weight, gates)
    rows, columns = blocks.shape[1:]
    with torch.no_grad():
        for block in blocks.unbind(0):
            wide = _normal((max(rows, columns), min(rows, columns)), generator)
            q, r = torch.linalg.qr(wide)
            q = q * r.diagonal().sign()  # makes the draw uniform
            block.copy_((q if rows >= columns else q.T) * gain)
    return weight


def unitary_(weight: Tensor, generator: Generator | None = None) -> Tensor:
    """The unitary matrix of Arjovsky, Shah and Bengio (arXiv:1511.06464), real, in every block.

    With D diagonal of phases U(-pi, pi), R a Householder reflection, F the unitary Fourier
    transform and P a random permutation, W = D_3 R_2 F^-1 D_2 P R_1 F D_1 is unitary, of size H/2.
    A state of H real numbers is H/2 complex ones, all real parts first, and the block is
    ((Re W, -Im W), (Im W, Re W)): orthogonal, its eigenvalues on the unit circle.

    Args:
        weight: (G*H, H), H even.

    Raises:
        TypeError: ``weight`` is no floating-point tensor.
        ValueError: its rows are not a multiple of its columns, or H is odd.
    """
    blocks = _blocks("unitary_", weight)
    size = weight.size(1)
    if size % 2:
        raise ValueError(
            f"unitary_: weight: got {size} columns, expected an even number (pairs of real and "
            "imaginary parts); use orthogonal_gates_ for an odd hidden_size"
        )
    half = size // 2
    with torch.no_grad():
        for block in blocks.unbind(0):
            w = _eye(half, generator).to(torch.complex128)
            # Columns are vectors: the factor that acts first is applied first.
            w = _phases(half, generator) * w
            w = _reflect(torch.fft.fft(w, dim=0, norm="ortho"), generator)
            w = w[torch.randperm(half, generator=generator, device=_where(generator))]
            w = torch.fft.ifft(_phases(half, generator) * w, dim=0, norm="ortho")
            w = _phases(half, generator) * _reflect(w, generator)
            upper, lower = torch.cat([w.real, -w.imag], 1), torch.cat([w.imag, w.real], 1)
            block.copy_(torch.cat([upper, lower]))
    return weight


def _blocks(name: str, weight: Tensor, gates: int | None = None) -> Tensor:
    """``weight`` as (G, H, K), a view."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name}: weight: got {got}, expected a floating-point tensor")
    shape = tuple(weight.shape)
    if weight.dim() != 2:
        levels = "; for an RHN's, fill each of `weight.detach()`" if weight.dim() == 3 else ""
        raise ValueError(
            f"{name}: weight: got shape {shape}, expected a weight_hh of (G*H, H){levels}"
        )
    if gates is not None:
        check_count(f"{name}: gates", gates)
    rows, columns = shape
    count = gates if gates is not None else (rows // columns if columns else 0)
    if count < 1 or rows % count or (gates is None and rows != count * columns):
        hint = "; pass gates= where blocks are not square" if name == "orthogonal_gates_" else ""
        raise ValueError(
            f"{name}: weight: got shape {shape}{'' if gates is None else f' for {gates} gates'}, "
            f"expected (G*H, H), one block of H rows for each of G gates{hint}"
        )
    return weight.unflatten(0, (count, rows // count))


def _where(generator: Generator | None) -> torch.device:
    """Where to draw: beside the generator; torch's default one is the CPU's, whatever the default
    device is."""
    return torch.device("cpu") if generator is None else generator.device


def _eye(size: int, generator: Generator | None = None) -> Tensor:
    return torch.eye(size, dtype=torch.float64, device=_where(generator))


def _normal(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=_where(generator))


def _phases(size: int, generator: Generator | None) -> Tensor:
    draw = torch.rand(size, generator=generator, dtype=torch.float64, device=_where(generator))
    angle = (draw * 2 - 1) * math.pi
    return torch.polar(torch.ones_like(angle), angle).unsqueeze(1)


def _reflect(w: Tensor, generator: Generator | None) -> Tensor:
    v = torch.view_as_complex(_normal((w.size(0), 2), generator)).unsqueeze(1)
    return w - v @ (v.mH @ w) * (2 / torch.linalg.vector_norm(v) ** 2)
