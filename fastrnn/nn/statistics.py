"""Running statistics of a batch-normalised module: their reset, and their means over a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.functional.bnlstm import STATISTICS


def listed(module: nn.Module, registered: dict[str, Any], names: list[str]) -> list[Any]:
    """The module's tensors of these names, which may be ``registered``."""
    try:  # several times as quick as getattr
        return [registered[name] for name in names]
    except KeyError:  # parametrised, pruned, weight-normed, replicated or deleted
        return [getattr(module, name) for name in names]


class RunningStatistics(nn.Module):
    """Adds ``reset_running_stats`` and ``recalibrate`` to a module that lists its buffers."""

    _statistic_names: list[str]

    def _statistics(self) -> list[Any]:
        return listed(self, self._buffers, self._statistic_names)

    def reset_running_stats(self) -> None:
        """Set running means and counts to 0 and running variances to 1."""
        for name, buffer in zip(self._statistic_names, self._statistics()):
            buffer.fill_(1 if "_var_" in name else 0)

    @torch.no_grad()
    def recalibrate(self, batches: Iterable[Any]) -> Any:
        """Replace the running statistics by their means over ``batches``, as the paper evaluates.

        The batches are run with the statistics of each batch, but without dropout and noise. Steps
        that no two sequences reach keep what they had, which also normalises them meanwhile.

        Args:
            batches: inputs as of forward, or pairs (input, lengths).

        Returns:
            self.

        Raises:
            TypeError: batches is one input, or holds what is neither an input nor such a pair.
            ValueError: no batch, or none in which two sequences reach a step.
            What forward raises; the running statistics then are what they were.
        """
        if isinstance(batches, (Tensor, PackedSequence)) or not isinstance(batches, Iterable):
            raise TypeError(
                f"recalibrate: batches: got {type(batches).__name__}, expected an iterable of "
                "inputs or of pairs (input, lengths); put a single one into a list"
            )
        kept = [buffer.clone() for buffer in self._statistics()]
        try:
            self._count_anew()
            for batch in batches:
                alone = isinstance(batch, (Tensor, PackedSequence))
                if not alone and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                    raise TypeError(
                        f"recalibrate: batches: got {type(batch).__name__} among them, expected "
                        "an input or a pair (input, lengths)"
                    )
                input, lengths = (batch, None) if alone else batch
                with self._recalibrating():
                    self(input, lengths=lengths)
            if not int(self._statistics()[STATISTICS - 1].sum()):
                raise ValueError(
                    "recalibrate: got no batch of two sequences or more, whose statistics could "
                    "be taken"
                )
            self._put_back(kept)
        except BaseException:
            for buffer, before in zip(self._statistics(), kept):
                buffer.copy_(before)
            raise
        return self

    def _count_anew(self) -> None:
        """Let a step's next batch replace what the step has, which serves until then."""
        for name, buffer in zip(self._statistic_names, self._statistics()):
            if buffer.is_floating_point():
                default = 1.0 if "_var_" in name else 0.0
                # A weight of 1 for the new value does not remove a NaN.
                buffer.nan_to_num_(default, default, default)
            else:
                buffer.zero_()

    def _put_back(self, kept: list[Tensor]) -> None:
        buffers = self._statistics()
        for first in range(0, len(buffers), STATISTICS):
            group = slice(first, first + STATISTICS)
            counts = buffers[group][-1]
            missed = counts == 0
            for buffer, before in zip(buffers[group], kept[group]):
                if buffer.size(0) == counts.size(0):  # else one row serves all steps
                    buffer[missed] = before[missed]

    _recalibrates = False

    @contextlib.contextmanager
    def _recalibrating(self) -> Iterator[None]:
        self._recalibrates = True
        try:
            yield
        finally:
            del self._recalibrates
