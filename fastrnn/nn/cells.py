"""LSTMCell, GRUCell and RNNCell: one time step, drop-ins for the classes in `torch.nn`.

They subclass torch's cells for the parameters, their initial values and the constructor (unlike
the layers, these subclasses do not stop dynamo); only the arithmetic is ours. torch makes its size
checks inside the operator it calls, so they stand here, with its messages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastrnn import functional
from fastrnn.nn.base import computes_weights
from fastrnn.nn.cache import PackedCache, current_cache
from fastrnn.nn.stepper import Layout, NativeCall
from fastrnn.nn.traced import Proxy, as_leaf


class _Cell(nn.modules.rnn.RNNCellBase):
    """Input checks and the packed-weight cache, shared by the three cells."""

    _packed: PackedCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_packed", None)
        return state

    def flatten_parameters(self) -> None:
        """Drop the packed copy of the weights that inference keeps between calls; needed only
        after writing to a few elements of a parameter through `.data`."""
        self._packed = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.flatten_parameters()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.flatten_parameters()  # before: torch swaps no tensor that a weak reference looks at
        super()._load_from_state_dict(*args, **kwargs)
        self.flatten_parameters()

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica._packed = None
        return replica

    def _cache(self) -> PackedCache | None:
        return current_cache(self)

    def _traced(self, input: Proxy, hx: Any) -> Any:
        leaf = as_leaf(self, input, hx)
        if leaf is None:
            raise TypeError(
                f"{type(self).__name__}: input should be a Tensor, got {type(input).__name__}; "
                "torch.fx can trace a module that holds this one, not its own arithmetic"
            )
        return leaf

    def _check_dims(self, name: str, input: Tensor, hidden: tuple[tuple[str, Tensor], ...]) -> None:
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for label, value in hidden:
            if value.dim() not in (1, 2):
                raise ValueError(
                    f"{name}: Expected {label} to be 1D or 2D, got {value.dim()}D instead"
                )

    def _check_sizes(self, input: Tensor, *hidden: Tensor) -> None:
        """The checks and messages of torch's lstm_cell, gru_cell and rnn_*_cell operators."""
        if input.size(1) != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}"
            )
        for index, value in enumerate(hidden):
            if value.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{index} "
                    f"batch size {value.size(0)}"
                )
            if value.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {value.size(1)}, "
                    f"expected {self.hidden_size}"
                )
            if value.dim() != 2:  # which torch lets pass
                raise RuntimeError(
                    f"hidden{index}: got {value.dim() - 1} dimensions for input without a batch, "
                    "expected 1: (H,)"
                )

    def _natively(self, cell: str, input: Tensor, h: Tensor, c: Tensor | None) -> Any:
        """(y, h, c) by the prepared native call, or None: take the general way."""
        if is_compiling() or computes_weights(self):
            return None
        weights = [self.weight_ih, self.weight_hh]
        if self.bias_ih is not None:
            weights += [self.bias_ih, self.bias_hh]
        known = None if self._packed is None else self._packed.stepper
        if known is not None and known.cell != cell:  # an attribute was changed
            known = None
        done = None if known is None else known(input, h, c, weights, self)
        if done is None:
            cache = self._cache()
            if cache is None or input.is_nested or not input.is_cpu:
                return None
            if not input.numel() or not self.hidden_size:
                return None
            sizes = (self.hidden_size, 0, 1, 1)
            stepper = NativeCall(cell, sizes, input, Layout.step(input), stacked=False)
            done = stepper(input, h, c, weights, self)
            if done is not None:
                cache.stepper = stepper
        return done

    def _single_state(self, name: str, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
        """Checked input (N, I) and state (N, H) of a cell with one state tensor."""
        self._check_dims(name, input, () if hx is None else (("hidden", hx),))
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
        if hx is None:
            hx = torch.zeros(
                input.size(0), self.hidden_size, dtype=input.dtype, device=input.device
            )
        elif not batched:
            hx = hx.unsqueeze(0)
        self._check_sizes(input, hx)
        return input, hx


class LSTMCell(_Cell, nn.LSTMCell):
    r"""One step of an LSTM, as `torch.nn.LSTMCell`; the formula is that of `fastrnn.LSTM`.

    Args:
        input_size: I.
        hidden_size: H; 0 is legal.
        bias: False leaves out bias_ih and bias_hh.
        device, dtype: of the parameters.

    Call `cell(input, hx=None)` -> (h, c):
        input: (N, I) or (I,).
        hx: (h, c), each (N, H), or (H,) for (I,) input; zeros if None.
        h, c: (N, H) or (H,), the next state.

    Raises what torch.nn.LSTMCell raises, with its messages.

    Parameters: weight_ih (4H, I), weight_hh (4H, H), bias_ih (4H), bias_hh (4H), gates i, f, g, o.
    """

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(input, Tensor) and isinstance(input, Proxy):
            return self._traced(input, hx)
        states = () if hx is None else tuple((f"hx[{i}]", h) for i, h in enumerate(hx))
        self._check_dims("LSTMCell", input, states)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
        if hx is None:
            zeros = torch.zeros(
                input.size(0), self.hidden_size, dtype=input.dtype, device=input.device
            )
            h, c = zeros, zeros
        else:
            if batched and isinstance(hx, Tensor):
                raise TypeError(
                    "lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor"
                )
            if batched and len(hx) != 2:
                raise RuntimeError("lstm_cell expects two hidden states")
            h, c = (hx[0], hx[1]) if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        self._check_sizes(input, h, c)
        if not torch.is_grad_enabled():
            done = self._natively("lstm", input, h, c)
            if done is not None:
                _, h, c = done
                return (h, c) if batched else (h.squeeze(0), c.squeeze(0))
        h, c = functional.lstm_cell(
            input,
            (h, c),
            self.weight_ih,
            self.weight_hh,
            self.bias_ih,
            self.bias_hh,
            cache=self._cache(),
        )
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


class GRUCell(_Cell, nn.GRUCell):
    r"""One step of a GRU, as `torch.nn.GRUCell`; the formula is that of `fastrnn.GRU`.

    Args:
        input_size: I.
        hidden_size: H; 0 is legal.
        bias: False leaves out bias_ih and bias_hh.
        device, dtype: of the parameters.

    Call `cell(input, hx=None)` -> h:
        input: (N, I) or (I,).
        hx: (N, H), or (H,) for (I,) input; zeros if None.
        h: (N, H) or (H,), the next state.

    Raises what torch.nn.GRUCell raises, with its messages.

    Parameters: weight_ih (3H, I), weight_hh (3H, H), bias_ih (3H), bias_hh (3H), gates r, z, n.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if not isinstance(input, Tensor) and isinstance(input, Proxy):
            return self._traced(input, hx)
        batched = input.dim() == 2
        input, hx = self._single_state("GRUCell", input, hx)
        if not torch.is_grad_enabled():
            done = self._natively("gru", input, hx, None)
            if done is not None:
                return done[1] if batched else done[1].squeeze(0)
        h = functional.gru_cell(
            input,
            hx,
            self.weight_ih,
            self.weight_hh,
            self.bias_ih,
            self.bias_hh,
            cache=self._cache(),
        )
        return h if batched else h.squeeze(0)


class RNNCell(_Cell, nn.RNNCell):
    r"""One step of an Elman network, as `torch.nn.RNNCell`; the formula is that of `fastrnn.RNN`.

    Args:
        input_size: I.
        hidden_size: H; 0 is legal.
        bias: False leaves out bias_ih and bias_hh.
        nonlinearity: "tanh" or "relu"; anything else is an error of the first call, as in torch.
        device, dtype: of the parameters.

    Call `cell(input, hx=None)` -> h:
        input: (N, I) or (I,).
        hx: (N, H), or (H,) for (I,) input; zeros if None.
        h: (N, H) or (H,), the next state.

    Raises what torch.nn.RNNCell raises, with its messages.

    Parameters: weight_ih (H, I), weight_hh (H, H), bias_ih (H), bias_hh (H).
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if not isinstance(input, Tensor) and isinstance(input, Proxy):
            return self._traced(input, hx)
        batched = input.dim() == 2
        input, hx = self._single_state("RNNCell", input, hx)
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        if not torch.is_grad_enabled():
            done = self._natively("rnn_" + self.nonlinearity, input, hx, None)
            if done is not None:
                return done[1] if batched else done[1].squeeze(0)
        h = functional.rnn_cell(
            input,
            hx,
            self.weight_ih,
            self.weight_hh,
            self.bias_ih,
            self.bias_hh,
            nonlinearity=self.nonlinearity,
            cache=self._cache(),
        )
        return h if batched else h.squeeze(0)
