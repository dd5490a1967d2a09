"""The cells whose layers the operators of ``fastrnn.ops.layer`` run, and what tells them apart."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["GATES", "KINDS", "Kind"]


class Kind(NamedTuple):
    """One cell.

    Attributes:
        number: the native library's (csrc/cpu/layer.h).
        gates: rows of weight_ih and weight_hh, in H.
        tape: values per unit that the backward reads back, besides y and the cell states.
        norms: parameters of layer norm at the end of a direction's weights: gains of the input and
            the recurrent term (gates * H), for an LSTM gain and bias of the cell (H).
        has_cell: there is a c beside h.
    """

    number: int
    gates: int
    tape: int
    norms: int = 0
    has_cell: bool = False


KINDS = {
    "lstm": Kind(0, 4, 4, has_cell=True),
    "gru": Kind(1, 3, 4),
    "gru_reset_before": Kind(2, 3, 3),
    "rnn_tanh": Kind(3, 1, 0),
    "rnn_relu": Kind(4, 1, 0),
    "lstm_layer_norm": Kind(5, 4, 8, norms=4, has_cell=True),
    "gru_layer_norm": Kind(6, 3, 6, norms=2),
}
GATES = {name: kind.gates for name, kind in KINDS.items()}
