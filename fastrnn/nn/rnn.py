"""LSTM, GRU and RNN: drop-ins for the classes of the same name in `torch.nn`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrnn.functional.checks import check_layer_norm
from fastrnn.nn.base import Parts
from fastrnn.nn.step import Steppable


class LSTM(Steppable):
    r"""A stack of long short-term memory layers, as `torch.nn.LSTM`.

    Each layer computes, for every step t, with gates in the order i, f, g, o::

        i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g_t = tanh   (W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f_t * c_{t-1} + i_t * g_t
        h_t = o_t * tanh(c_t)                    h_t = W_hr (o_t * tanh(c_t)) with proj_size

    This is Gers et al. (2000), without peepholes and with cuDNN's two biases; the projection is
    that of Sak et al. (2014). In the shapes T is the number of steps, N the batch, I input_size,
    H hidden_size, L num_layers, D 2 if bidirectional else 1, P proj_size or H.

    Regularisers, with masks m that keep each element with probability 1 - p, drawn for every layer,
    direction, sequence and unit (and step)::

        "update"   c_t = f_t * c_{t-1} + m * (i_t * g_t)       Semeniuta et al., arXiv:1603.05118
        "cell"     c_t = m * (f_t * c_{t-1} + i_t * g_t)       Moon et al. 2015
        "state"    m * h_{t-1} / (1 - p) meets W_hh            Gal and Ghahramani, arXiv:1512.05287
        zoneout    h_t, c_t = m * new + (1 - m) * old          Krueger et al., arXiv:1606.01305
        weights    m * weight_hh / (1 - p), once per call      Merity et al., arXiv:1708.02182

    With layer_norm (Ba et al., arXiv:1607.06450) the two terms of the gates and the cell on its way
    to h_t are normalised over the features of a row, LN(u) = (u - mean) / sqrt(var + 1e-5) with
    the biased variance, each term over its four gates together::

        gates  = ln_weight_ih * LN(W_ih x_t) + ln_weight_hh * LN(W_hh h_{t-1}) + b_ih + b_hh
        h_t    = o_t * tanh(ln_weight_c * LN(c_t) + ln_bias_c)

    In evaluation 1 - p takes the place of m in "update", "cell" and zoneout; the others do nothing.
    Zoneout with one p zones h and c, each with its own mask; h_t is made from the new cell before
    zoneout puts the old one back. A call in training draws one seed from torch's default CPU
    generator; masks depend on it alone, not on threads or layout, and are not stored.

    Args:
        input_size: I, features of x_t.
        hidden_size: H, features of c_t, and of h_t without projection.
        num_layers: L; layer k > 0 reads the (D * P) outputs of layer k - 1.
        bias: False leaves out b_ih and b_hh.
        batch_first: input and output are (N, T, features); states are not affected.
        dropout: probability of zeroing each output of all layers but the last, in training.
        bidirectional: a second set of weights reads the sequence from its end.
        proj_size: 0, or P < H, the size h_t is projected to.
        device, dtype: of the parameters.
        recompute: keep only the states for the backward pass and compute the gates again: less
            memory, more time, the same gradients.
        recurrent_dropout: p in [0, 1], see above.
        recurrent_dropout_mode: "update", "cell" or "state".
        recurrent_dropout_per: "step" draws masks anew at every step, "sequence" once for all steps.
        zoneout: p, or (p_h, p_c), in [0, 1].
        weight_dropout: p in [0, 1], the chance of each element of weight_hh to be zeroed.
        layer_norm: normalise the terms of the gates, and the cell on its way to h_t, see above.

    Call `lstm(input, hx=None, *, lengths=None, reset=None, return_cells=False)`:
        input: (T, N, I), (N, T, I) if batch_first, (T, I) unbatched, or a PackedSequence.
        hx: (h_0, c_0) of (D * L, N, P) and (D * L, N, H), without N if unbatched; zeros if None.
        lengths: N integers in 1..T for a batch padded at the right, in any order. Outputs past a
            sequence's end are 0, the final state is that of its last step, and the reverse
            direction starts there.
        reset: bool (T, N), or (N, T) if batch_first; where True, h and c are zeroed in every
            layer and direction before step t is processed.
        return_cells: also return c_t of every step.

    Returns (output, (h_n, c_n)), or (output, (h_n, c_n), cells):
        output: (T, N, D * P), of the last layer, directions side by side, laid out as the input
            is; a PackedSequence if the input is one.
        h_n, c_n: (D * L, N, P) and (D * L, N, H), the states after the last step.
        cells: (T, N, D * H), c_t of the last layer, laid out as output.

    Raises what torch.nn.LSTM raises, with its messages. TypeError: lengths that are not integers,
    reset that is no bool tensor. ValueError: lengths or reset given with a PackedSequence, or on
    another device; lengths outside 1..T or not N of them; reset of another shape.

    Parameters, layer k, with `_reverse` appended for the second direction:
        weight_ih_l{k} (4H, I or D * P), weight_hh_l{k} (4H, P), bias_ih_l{k} (4H), bias_hh_l{k}
        (4H), weight_hr_l{k} (P, H) if proj_size; each drawn from U(-1/sqrt(H), 1/sqrt(H)) in the
        order of torch.nn, so that one seed gives both the same values. With layer_norm also
        ln_weight_ih_l{k}, ln_weight_hh_l{k} (4H), ln_weight_c_l{k} (H), ones, and ln_bias_c_l{k}
        (H), zeros.
    """

    recurrent_dropout_mode: str = "update"

    # RNNBase has these for one state tensor; torch.nn.LSTM's own take the pair.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_mode: str = "update",
        recurrent_dropout_per: str = "step",
        zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            recompute=recompute,
            recurrent_dropout=recurrent_dropout,
            recurrent_dropout_mode=recurrent_dropout_mode,
            recurrent_dropout_per=recurrent_dropout_per,
            zoneout=zoneout,
            weight_dropout=weight_dropout,
            layer_norm=layer_norm,
        )

    def _split(self, hx: Any) -> Parts:
        pair = isinstance(hx, (tuple, list)) and all(isinstance(part, Tensor) for part in hx)
        if (pair or isinstance(hx, Tensor)) and len(hx) == 2:
            return hx[0], hx[1]
        got = f"{len(hx)} of them" if pair else type(hx).__name__
        raise TypeError(f"LSTM: hx should be a pair of tensors (h_0, c_0), got {got}")

    def _join(self, parts: Parts) -> Any:
        return parts

    def _check_return_cells(self, return_cells: bool) -> None:
        pass

    def _call(self, input: Tensor, parts: Parts | None, **options: Any) -> Any:
        output, h_n, c_n, *cells = self._function("lstm", options)(
            input,
            None if parts is None else (parts[0], parts[1]),
            self._present_weights(),
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout if self.training and self.dropout != 0 else 0,
            training=self.training,
            bidirectional=self.bidirectional,
            proj_size=self.proj_size,
            recompute=self.recompute,
            layer_norm=self.layer_norm,
            cache=self._cache(),
            **(self._regulariser_options() if self._rates else {}),
            **options,
        )
        return (output, (h_n, c_n), *cells)


class GRU(Steppable):
    r"""A stack of gated recurrent unit layers, as `torch.nn.GRU`.

    Each layer computes, for every step t, with gates in the order r, z, n::

        r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n_t = tanh   (W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))      reset_after=True
        n_t = tanh   (W_in x_t + b_in + W_hn (r_t * h_{t-1}) + b_hn)      reset_after=False
        h_t = (1 - z_t) * n_t + z_t * h_{t-1}

    reset_after=True is the variant of cuDNN and torch.nn (Cho et al., arXiv 1406.1078 v1);
    reset_after=False that of the paper's later versions and of Chung et al. (2014). Both have the
    same parameters. T is the number of steps, N the batch, I input_size, H hidden_size, L
    num_layers, D 2 if bidirectional else 1.

    Regularisers, with masks m that keep each element with probability 1 - p, drawn for every layer,
    direction, sequence and unit (and step)::

        "update"   h_t = (1 - z_t) * (m * n_t) + z_t * h_{t-1}    Semeniuta et al., arXiv:1603.05118
        "state"    m * h_{t-1} / (1 - p) meets W_hh, z_t * h_{t-1} keeps the whole state: Gal and
                   Ghahramani, arXiv:1512.05287
        zoneout    h_t = m * new + (1 - m) * old                  Krueger et al., arXiv:1606.01305
        weights    m * weight_hh / (1 - p), once per call         Merity et al., arXiv:1708.02182

    With layer_norm (Ba et al., arXiv:1607.06450) the two terms of the gates are normalised over the
    features of a row, LN(u) = (u - mean) / sqrt(var + 1e-5) with the biased variance, each over its
    three gates together: ln_weight_ih * LN(W_ih x_t) + b_ih takes the place of W_ih x_t + b_ih, and
    ln_weight_hh * LN(W_hh h_{t-1}) + b_hh that of the recurrent term.

    In evaluation 1 - p takes the place of m in "update" and zoneout; the others do nothing. A call
    in training draws one seed from torch's default CPU generator; masks depend on it alone, not on
    threads or layout, and are not stored.

    Args:
        input_size: I, features of x_t.
        hidden_size: H, features of h_t.
        num_layers: L; layer k > 0 reads the (D * H) outputs of layer k - 1.
        bias: False leaves out b_ih and b_hh.
        batch_first: input and output are (N, T, features); states are not affected.
        dropout: probability of zeroing each output of all layers but the last, in training.
        bidirectional: a second set of weights reads the sequence from its end.
        device, dtype: of the parameters.
        reset_after: where the reset gate acts, see above.
        recompute: keep only the states for the backward pass and compute the gates again: less
            memory, more time, the same gradients.
        recurrent_dropout: p in [0, 1], see above.
        recurrent_dropout_mode: "update" or "state".
        recurrent_dropout_per: "step" draws masks anew at every step, "sequence" once for all steps.
        zoneout: p in [0, 1], on h.
        weight_dropout: p in [0, 1], the chance of each element of weight_hh to be zeroed.
        layer_norm: normalise the terms of the gates; with reset_after only, see above.

    Call `gru(input, hx=None, *, lengths=None, reset=None)`:
        input: (T, N, I), (N, T, I) if batch_first, (T, I) unbatched, or a PackedSequence.
        hx: h_0 of (D * L, N, H), without N if unbatched; zeros if None.
        lengths: N integers in 1..T for a batch padded at the right, in any order. Outputs past a
            sequence's end are 0, the final state is that of its last step, and the reverse
            direction starts there.
        reset: bool (T, N), or (N, T) if batch_first; where True, h is zeroed in every layer and
            direction before step t is processed.

    Returns (output, h_n):
        output: (T, N, D * H), of the last layer, directions side by side, laid out as the input
            is; a PackedSequence if the input is one.
        h_n: (D * L, N, H), the states after the last step.

    Raises what torch.nn.GRU raises, with its messages. TypeError: lengths that are not integers,
    reset that is no bool tensor. ValueError: lengths or reset given with a PackedSequence, or on
    another device; lengths outside 1..T or not N of them; reset of another shape; return_cells.

    Parameters, layer k, with `_reverse` appended for the second direction:
        weight_ih_l{k} (3H, I or D * H), weight_hh_l{k} (3H, H), bias_ih_l{k} (3H), bias_hh_l{k}
        (3H); each drawn from U(-1/sqrt(H), 1/sqrt(H)) in the order of torch.nn. With layer_norm
        also ln_weight_ih_l{k} and ln_weight_hh_l{k} (3H), ones.
    """

    recurrent_dropout_mode: str = "update"

    reset_after: bool = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        recompute: bool = False,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_mode: str = "update",
        recurrent_dropout_per: str = "step",
        zoneout: float = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        **unsupported: Any,
    ) -> None:
        _reject("GRU", unsupported)
        if not isinstance(reset_after, bool):
            raise TypeError(
                f"reset_after should be of type bool, got: {type(reset_after).__name__}"
            )
        if layer_norm is True:
            check_layer_norm(reset_after)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
            recurrent_dropout=recurrent_dropout,
            recurrent_dropout_mode=recurrent_dropout_mode,
            recurrent_dropout_per=recurrent_dropout_per,
            zoneout=zoneout,
            weight_dropout=weight_dropout,
            layer_norm=layer_norm,
        )
        self.reset_after = reset_after

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def _cell(self) -> str:
        return super()._cell() if self.reset_after else "gru_reset_before"

    def _call(self, input: Tensor, parts: Parts | None, **options: Any) -> Any:
        options.pop("return_cells", None)
        output, h_n = self._function("gru", options)(
            input,
            None if parts is None else parts[0],
            self._present_weights(),
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout if self.training and self.dropout != 0 else 0,
            training=self.training,
            bidirectional=self.bidirectional,
            reset_after=self.reset_after,
            recompute=self.recompute,
            layer_norm=self.layer_norm,
            cache=self._cache(),
            **(self._regulariser_options() if self._rates else {}),
            **options,
        )
        return output, (h_n,)


class RNN(Steppable):
    r"""A stack of Elman layers, as `torch.nn.RNN`.

    Each layer computes, for every step t::

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)         relu(...) with nonlinearity="relu"

    T is the number of steps, N the batch, I input_size, H hidden_size, L num_layers, D 2 if
    bidirectional else 1. The two biases are cuDNN's.

    Regularisers, with masks m that keep each element with probability 1 - p, drawn for every layer,
    direction, sequence and unit (and step)::

        "state"    m * h_{t-1} / (1 - p) meets W_hh            Gal and Ghahramani, arXiv:1512.05287
        zoneout    h_t = m * new + (1 - m) * old               Krueger et al., arXiv:1606.01305
        weights    m * weight_hh / (1 - p), once per call      Merity et al., arXiv:1708.02182

    In evaluation 1 - p takes the place of m in zoneout; the others do nothing. A call in training
    draws one seed from torch's default CPU generator; masks depend on it alone, not on threads or
    layout, and are not stored.

    Args:
        input_size: I, features of x_t.
        hidden_size: H, features of h_t.
        num_layers: L; layer k > 0 reads the (D * H) outputs of layer k - 1.
        nonlinearity: "tanh" or "relu".
        bias: False leaves out b_ih and b_hh.
        batch_first: input and output are (N, T, features); states are not affected.
        dropout: probability of zeroing each output of all layers but the last, in training.
        bidirectional: a second set of weights reads the sequence from its end.
        device, dtype: of the parameters.
        recompute: accepted for uniformity; a layer without gates keeps nothing but its states.
        recurrent_dropout: p in [0, 1], see above.
        recurrent_dropout_mode: "state", the only one.
        recurrent_dropout_per: "step" draws masks anew at every step, "sequence" once for all steps.
        zoneout: p in [0, 1], on h.
        weight_dropout: p in [0, 1], the chance of each element of weight_hh to be zeroed.

    Call `rnn(input, hx=None, *, lengths=None, reset=None)`:
        input: (T, N, I), (N, T, I) if batch_first, (T, I) unbatched, or a PackedSequence.
        hx: h_0 of (D * L, N, H), without N if unbatched; zeros if None.
        lengths: N integers in 1..T for a batch padded at the right, in any order. Outputs past a
            sequence's end are 0, the final state is that of its last step, and the reverse
            direction starts there.
        reset: bool (T, N), or (N, T) if batch_first; where True, h is zeroed in every layer and
            direction before step t is processed.

    Returns (output, h_n):
        output: (T, N, D * H), of the last layer, directions side by side, laid out as the input
            is; a PackedSequence if the input is one.
        h_n: (D * L, N, H), the states after the last step.

    Raises what torch.nn.RNN raises, with its messages. TypeError: lengths that are not integers,
    reset that is no bool tensor. ValueError: lengths or reset given with a PackedSequence, or on
    another device; lengths outside 1..T or not N of them; reset of another shape; return_cells.

    Parameters, layer k, with `_reverse` appended for the second direction:
        weight_ih_l{k} (H, I or D * H), weight_hh_l{k} (H, H), bias_ih_l{k} (H), bias_hh_l{k} (H);
        each drawn from U(-1/sqrt(H), 1/sqrt(H)) in the order of torch.nn.
    """

    recurrent_dropout_mode: str = "state"

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_mode: str = "state",
        recurrent_dropout_per: str = "step",
        zoneout: float = 0.0,
        weight_dropout: float = 0.0,
        **unsupported: Any,
    ) -> None:
        _reject("RNN", unsupported)
        modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
        if nonlinearity not in modes:
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(
            modes[nonlinearity],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
            recurrent_dropout=recurrent_dropout,
            recurrent_dropout_mode=recurrent_dropout_mode,
            recurrent_dropout_per=recurrent_dropout_per,
            zoneout=zoneout,
            weight_dropout=weight_dropout,
        )
        self.nonlinearity = nonlinearity

    def _rank_message(self, rank: int) -> str:
        return f"RNN: Expected input to be 2D or 3D, got {rank}D tensor instead"

    def _call(self, input: Tensor, parts: Parts | None, **options: Any) -> Any:
        options.pop("return_cells", None)
        output, h_n = self._function("rnn", options)(
            input,
            None if parts is None else parts[0],
            self._present_weights(),
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout if self.training and self.dropout != 0 else 0,
            training=self.training,
            bidirectional=self.bidirectional,
            nonlinearity="tanh" if self.mode == "RNN_TANH" else "relu",
            recompute=self.recompute,
            cache=self._cache(),
            **(self._regulariser_options() if self._rates else {}),
            **options,
        )
        return output, (h_n,)


def _reject(name: str, unsupported: dict[str, Any]) -> None:
    """Refuse unknown keywords: proj_size in torch's words, others in Python's."""
    if "proj_size" in unsupported:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    if unsupported:
        raise TypeError(
            f"{name}.__init__() got an unexpected keyword argument '{next(iter(unsupported))}'"
        )
