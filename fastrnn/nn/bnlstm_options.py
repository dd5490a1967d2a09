"""The options of a BNLSTM that may be set later; each is checked when it is, as in the constructor.

A call does not check them: one that is prepared, or compiled, would not see what they are set to.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastrnn.functional.checks import check_number, check_process_group, check_settings


def check_input_stats(value: object) -> None:
    if value not in ("step", "sequence"):
        raise ValueError(f"input_stats should be 'step' or 'sequence', got {value!r}")


class BNLSTMOptions(nn.Module):
    """Adds the properties to a module that has their values under names with an underscore."""

    _dropout: float
    _eps: str
    _forget_bias: float
    _gamma_init: float
    _h0_noise: float
    _input_stats: str
    _max_length: int
    _momentum: float | None
    _process_group: Any

    @property
    def dropout(self) -> float:
        """Probability of zeroing each output of all layers but the last."""
        return self._dropout

    @dropout.setter
    def dropout(self, value: float) -> None:
        check_settings(value, self.eps, self.momentum, self.h0_noise)
        self._dropout = float(value)

    @property
    def eps(self) -> float:
        """Added to the variance."""
        # Kept as text: with dynamic=True dynamo makes a float attribute a symbol, which an
        # autograd.Function does not take.
        return float(self._eps)

    @eps.setter
    def eps(self, value: float) -> None:
        check_settings(self.dropout, value, self.momentum, self.h0_noise)
        self._eps = repr(float(value))

    @property
    def momentum(self) -> float | None:
        """Weight of a new batch in the running statistics; None: their mean over batches."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        check_settings(self.dropout, self.eps, value, self.h0_noise)
        self._momentum = None if value is None else float(value)

    @property
    def h0_noise(self) -> float:
        """Standard deviation of noise added to h_0."""
        return self._h0_noise

    @h0_noise.setter
    def h0_noise(self, value: float) -> None:
        check_settings(self.dropout, self.eps, self.momentum, value)
        self._h0_noise = float(value)

    @property
    def gamma_init(self) -> float:
        """What reset_parameters gives the three gammas."""
        return self._gamma_init

    @gamma_init.setter
    def gamma_init(self, value: float) -> None:
        check_number("gamma_init", value)
        self._gamma_init = float(value)

    @property
    def forget_bias(self) -> float:
        """What reset_parameters gives the forget slice of the biases."""
        return self._forget_bias

    @forget_bias.setter
    def forget_bias(self, value: float) -> None:
        check_number("forget_bias", value)
        self._forget_bias = float(value)

    @property
    def input_stats(self) -> str:
        """ "step", or "sequence": one statistic of W_ih x over all steps."""
        return self._input_stats

    @input_stats.setter
    def input_stats(self, value: str) -> None:
        check_input_stats(value)
        self._input_stats = value

    @property
    def process_group(self) -> Any:
        """The group of torch.distributed over whose ranks statistics are taken, or None."""
        return self._process_group

    @process_group.setter
    def process_group(self, value: Any) -> None:
        check_process_group(value)
        self._process_group = value

    @property
    def max_length(self) -> int:
        """Rows of the statistics; the buffers are made for as many, so it cannot be set."""
        return self._max_length
