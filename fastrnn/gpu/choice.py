"""Which backend serves a call on a GPU: the one of the least time, if its kernels are right.

Times are those of ``fastrnn.gpu.times``. What torch would do without us, its own kernels or a
Python loop, is given up only for a backend that is faster by a margin, and whose kernels are
verified: by the data, or by a trial before their first use (``fastrnn.gpu.trial``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from fastrnn.backends import SERVES, Problem, cuda_native
from fastrnn.backends.rows import tf32_allowed
from fastrnn.gpu import times, trial

__all__ = ["Choice", "choose", "forget"]

_OURS = ("cuda", "triton")
_ALL = (*_OURS, "torch", "reference")
_WORDS = {"torch": "torch's own kernels", "reference": "a Python loop"}


class Choice(NamedTuple):
    """A backend, why that one, and (backend, reason) of the others."""

    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()


class _Contestant(NamedTuple):
    backend: str
    reason: str
    keys: tuple[trial.Key, ...] = ()  # of the trials that it has to pass


class _Ranking(NamedTuple):
    contestants: tuple[_Contestant, ...]
    rejected: tuple[tuple[str, str], ...]


def forget() -> None:
    """As if nothing had been chosen or tried."""
    _ranking.cache_clear()
    trial.forget()


def choose(p: Problem, runs: bool) -> Choice | None:
    """The backend of a call on a GPU; None if none can serve it.

    Args:
        runs: the call is about to run, so kernels may be tried. Otherwise, for ``explain``, what
            would be tried counts as right, and the reason says so.
    """
    if is_compiling():
        served = tuple(
            name for name in ("cuda", "triton", "torch", "reference") if _serves(name, p)
        )
        backend = _traced(
            served, p.cell, p.dtype, p.given, p.training, p.hidden_size, p.proj_size, p.directions,
            p.num_layers, p.packed, p.lengths, p.reset, p.return_cells, p.recompute, p.depth,
            p.gates, p.regularisers, p.gate_masks, p.ordinal,
        )  # fmt: skip
        return Choice(backend, "chosen while tracing") if backend else None
    ordinal = _ordinal(p)
    # Times of calls that differ a little in length differ a little: they share one ranking.
    steps = 1 << max(p.steps - 1, 0).bit_length()
    known = (tf32_allowed(), cuda_native.refused_grids())
    ranking = _ranking(p._replace(steps=steps, ordinal=ordinal), *known)
    return _first(ranking, p, ordinal, runs)


def _serves(name: str, p: Problem) -> bool:
    return not SERVES[name](p)


def _ordinal(p: Problem) -> int:
    if p.ordinal is not None:
        return p.ordinal
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _first(
    ranking: _Ranking, p: Problem, ordinal: int, runs: bool, hindrance: str = ""
) -> Choice | None:
    """The first contestant whose kernels are right; those before it are among the rejected."""
    rejected = ranking.rejected
    for place, (backend, reason, keys) in enumerate(ranking.contestants, 1):
        verdicts = [trial.verdict(key) for key in keys]
        why = next(filter(None, verdicts), "")
        if not why and None in verdicts:
            if not runs:
                reason += "; its kernels will be tried against the reference at the first call"
            elif hindrance := hindrance or trial.hindrance():
                why = (
                    f"its kernels were not tried in this process yet, which {hindrance} cannot do: "
                    "call the layer once before"
                )
            else:
                (key,) = keys  # only a traced call has several
                why = trial.attempt(key, p, where(ordinal))
        if not why:
            slower = (each for each in ranking.contestants[place:] if each.backend in _OURS)
            times_of = [(each.backend, each.reason.partition(";")[0]) for each in slower]
            return Choice(backend, reason, (*rejected, *times_of))
        rejected = (*rejected, (backend, why))
    return None


def where(ordinal: int) -> torch.device:
    """Where trials have their tensors."""
    return torch.device("cuda", ordinal)


@lru_cache(maxsize=512)
def _ranking(p: Problem, tf32: bool, refused_grids: int) -> _Ranking:
    """Those that can serve and are worth it, best first, torch or the loop last; ``p.ordinal`` is
    the device, ``tf32`` the switch by which float32 gets its format. Plans, and so the trials that
    are due, change where a driver refuses a grid."""
    return _rank(p, {name: SERVES[name](p) for name in _ALL})


def _rank(p: Problem, refusals: dict[str, str], any_batch: bool = False) -> _Ranking:
    assert p.ordinal is not None
    at, table = times.device(p.ordinal), times.table()
    rejected = [(name, why) for name, why in refusals.items() if why and name != "reference"]
    last = "reference" if refusals["torch"] else "torch"
    if refusals[last]:
        return _Ranking((), (*rejected, (last, refusals[last])))
    theirs = times.estimate(last, p, at)
    assert theirs is not None
    limit = theirs.total(p.steps)
    worth: list[tuple[float, _Contestant]] = []
    for name in _OURS:
        if refusals[name]:
            continue
        try:
            ours = times.estimate(name, p, at)
        except RuntimeError as error:  # no plan for this batch
            rejected.append((name, str(error)))
            continue
        if ours is None:
            # Without a number nothing is taken from torch; a loop of launches is no match.
            if last == "torch":
                rejected.append((name, "nobody can say how long it takes here"))
                continue
            text, total = "no estimate, but far fewer launches", limit
        else:
            total = ours.total(p.steps)
            kind = "measured" if ours.source and theirs.source else "modelled"
            margin = table.data["margin"][kind]
            if total * margin > limit:
                rejected.append((name, f"{ours}, no {margin:g} times faster than {last}"))
                continue
            text = f"{ours}" + (f" on {ours.source}" if ours.source else "")
        reason = f"{text}; {_WORDS[last]}: {theirs}"
        # The campaign's tests see every family of Triton's, not every tile.
        verified = name == "cuda" and table.verified(
            at, name, times.family(p), times.format_name(p)
        )
        keys: tuple[trial.Key, ...] = ()
        if not verified:
            of_one = (trial.key_of(name, p, p.ordinal),)
            keys = trial.keys_of_any_batch(name, p, p.ordinal) if any_batch else of_one
        worth.append((total, _Contestant(name, reason, keys)))
    worth.sort(key=lambda each: each[0])
    first = [contestant for _, contestant in worth]
    why = "torch's own kernels serve this call" if last == "torch" else (
        "plain PyTorch serves every option, on every device"
    )  # fmt: skip
    return _Ranking((*first, _Contestant(last, f"{why}, {theirs}")), tuple(rejected))


def _traced(served: tuple[str, ...], *fields: Any) -> str:
    """``choose`` in a traced call, a constant there: lengths and batches are unknown, so it is
    judged at those of the table."""
    (
        cell, dtype, given, training, hidden, proj, directions, layers, packed, lengths, reset,
        return_cells, recompute, depth, gates, regularisers, gate_masks, ordinal,
    ) = fields  # fmt: skip
    typical = times.table().data["traced"]
    p = Problem(
        cell, "cuda", dtype, training, typical["steps"], typical["batch"], hidden, hidden, proj,
        directions, layers, packed, lengths, reset, return_cells, recompute, False, depth, gates,
        False, regularisers, given, gate_masks, ordinal,
    )  # fmt: skip
    ordinal = _ordinal(p)
    refusals = {name: "" if name in served else "it cannot serve this call" for name in _ALL}
    found = _rank(p._replace(ordinal=ordinal), refusals, any_batch=True)
    best = _first(found, p, ordinal, True, "a traced call")
    return best.backend if best else ""


_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]
