"""RHN: the Recurrent Highway Network."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastrnn import functional
from fastrnn.functional.checks import check_count, check_number
from fastrnn.functional.rhn import check_probability
from fastrnn.nn.base import Parts
from fastrnn.nn.rhn_call import RhnNativeCall, RhnTrainingCall
from fastrnn.nn.step import Steppable
from fastrnn.nn.stepper import Layout


class RHN(Steppable):
    r"""A stack of Recurrent Highway layers.

    Each layer takes `depth` micro-steps of its state in every time step. With s_0 = y_{t-1} and
    l = 1 .. depth, gates in the order h, t[, c], and x_t entering at l = 1 only::

        h_l = tanh   (W_h (m_x * x_t) [l = 1] + R_{h,l} (m_s * s_{l-1}) + b_{h,l})
        t_l = sigmoid(W_t (m_x * x_t) [l = 1] + R_{t,l} (m_s * s_{l-1}) + b_{t,l})
        c_l = 1 - t_l                                                            couple_carry=True
        c_l = sigmoid(W_c (m_x * x_t) [l = 1] + R_{c,l} (m_s * s_{l-1}) + b_{c,l})           False
        s_l = h_l * t_l + s_{l-1} * c_l
        y_t = s_depth

    This is Zilly, Srivastava, Koutnik and Schmidhuber (2017), arXiv:1607.03474, with variational
    masks m_x and m_s, Gal and Ghahramani (2016), arXiv:1512.05287: drawn once per call for every
    sequence, layer and direction, shared over time and depth, scaled by 1 / (1 - p), absent in
    eval. The carry s_{l-1} * c_l sees the state without its mask. In the shapes T is the number of
    steps, N the batch, I input_size, H hidden_size, L num_layers, D 2 if bidirectional else 1, and
    G the number of gates, 2 if couple_carry else 3.

    Args:
        input_size: I, features of x_t.
        hidden_size: H, features of the state.
        num_layers: L; layer k > 0 reads the (D * H) outputs of layer k - 1.
        bias: False leaves out the biases, and with them transform_bias.
        batch_first: input and output are (N, T, features); states are not affected.
        dropout: probability of zeroing each output of all layers but the last, in training.
        bidirectional: a second set of weights reads the sequence from its end.
        device, dtype: of the parameters.
        depth: micro-steps in each time step, at least 1.
        couple_carry: c = 1 - t; False gives the carry gate weights of its own.
        transform_bias: initial bias of the transform gate t. Negative: the state is carried at
            first. The bias of an uncoupled carry gate starts at -transform_bias, which makes
            c = 1 - t of the bias alone: both forms begin alike.
        variational_input, variational_state: probabilities of zeroing in m_x and m_s, in training.
        tie_gate_masks: all gates share one mask; False draws one for each gate.
        init_range: weights and the other biases are drawn from U(-init_range, init_range).
        recompute: keep only the outputs for the backward pass and compute the gates again: less
            memory, more time, the same gradients.

    Call `rhn(input, hx=None, *, lengths=None, reset=None)`:
        input: (T, N, I), (N, T, I) if batch_first, (T, I) unbatched, or a PackedSequence.
        hx: h_0 of (D * L, N, H), without N if unbatched; zeros if None.
        lengths: N integers in 1..T for a batch padded at the right, in any order. Outputs past a
            sequence's end are 0, the final state is that of its last step, and the reverse
            direction starts there.
        reset: bool (T, N), or (N, T) if batch_first; where True, the state is zeroed in every
            layer and direction before step t is processed.

    Returns (output, h_n):
        output: (T, N, D * H), of the last layer, directions side by side, laid out as the input
            is; a PackedSequence if the input is one.
        h_n: (D * L, N, H), the states after the last step.

    Raises RuntimeError where sizes, dtypes or devices do not agree, with torch.nn's messages.
    TypeError: lengths that are not integers, reset that is no bool tensor. ValueError: depth,
    hidden_size or num_layers below 1, a probability outside [0, 1], a negative init_range, lengths
    or reset given with a PackedSequence, lengths outside 1..T or not N of them, reset of another
    shape, return_cells=True.

    Parameters, layer k, with `_reverse` appended for the second direction:
        weight_ih_l{k} (G * H, I or D * H), weight_hh_l{k} (depth, G * H, H),
        bias_l{k} (depth, G * H).
    """

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
        depth: int = 5,
        couple_carry: bool = True,
        transform_bias: float = -2.0,
        variational_input: float = 0.0,
        variational_state: float = 0.0,
        tie_gate_masks: bool = True,
        init_range: float = 0.04,
        recompute: bool = False,
    ) -> None:
        check_count("input_size", input_size, 0)
        check_count("hidden_size", hidden_size)
        check_count("num_layers", num_layers)
        check_count("depth", depth)
        _check_flags(
            bias=bias,
            batch_first=batch_first,
            bidirectional=bidirectional,
            couple_carry=couple_carry,
            tie_gate_masks=tie_gate_masks,
            recompute=recompute,
        )
        check_probability("dropout", dropout)
        check_probability("variational_input", variational_input)
        check_probability("variational_state", variational_state)
        check_number("transform_bias", transform_bias)
        _check_range(init_range)
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero "
                f"dropout expects num_layers greater than 1, but got dropout={dropout} and "
                f"num_layers={num_layers}",
                stacklevel=2,
            )
        # torch.nn.RNNBase.__init__ knows its own four cells only; the attributes are its.
        nn.Module.__init__(self)
        self.mode = "RHN"
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self._dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, 0
        self._depth, self.couple_carry = depth, couple_carry
        self._transform_bias, self._init_range = float(transform_bias), float(init_range)
        self._variational_input = float(variational_input)
        self._variational_state = float(variational_state)
        self.tie_gate_masks, self.recompute = tie_gate_masks, recompute

        rows, directions = self._gates * hidden_size, 2 if bidirectional else 1
        self._flat_weights_names: list[str] = []
        self._all_weights: list[list[str]] = []
        self._flat_weight_refs: list[Any] = []
        for layer in range(num_layers):
            wide = input_size if layer == 0 else directions * hidden_size
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (rows, wide),
                "weight_hh": (depth, rows, hidden_size),
            }
            if bias:
                shapes["bias"] = (depth, rows)
            for suffix in ("", "_reverse")[:directions]:
                names = [f"{name}_l{layer}{suffix}" for name in shapes]
                for name, shape in zip(names, shapes.values(), strict=True):
                    value = torch.empty(shape, device=device, dtype=dtype)
                    setattr(self, name, nn.Parameter(value))
                self._flat_weights_names += names
                self._all_weights.append(names)
        self.reset_parameters()

    def _set_rates(self, first: int, *values: float) -> None:
        name = ("recurrent_dropout", "zoneout", "zoneout", "weight_dropout")[first]
        raise AttributeError(
            f"{name}: got {values[0]!r}, but an RHN has no {name}; its regularisers are "
            "variational_input and variational_state"
        )

    # Checked when they are set: a call that is prepared takes each for a number.
    @property
    def dropout(self) -> float:
        """Probability of zeroing each output of all layers but the last."""
        return self._dropout

    @dropout.setter
    def dropout(self, value: float) -> None:
        check_probability("dropout", value)
        self._dropout = float(value)

    @property
    def variational_input(self) -> float:
        """Probability of zeroing in the mask of a layer's input."""
        return self._variational_input

    @variational_input.setter
    def variational_input(self, value: float) -> None:
        check_probability("variational_input", value)
        self._variational_input = float(value)

    @property
    def variational_state(self) -> float:
        """Probability of zeroing in the mask of a layer's state."""
        return self._variational_state

    @variational_state.setter
    def variational_state(self, value: float) -> None:
        check_probability("variational_state", value)
        self._variational_state = float(value)

    @property
    def transform_bias(self) -> float:
        """What reset_parameters gives the bias of the transform gate."""
        return self._transform_bias

    @transform_bias.setter
    def transform_bias(self, value: float) -> None:
        check_number("transform_bias", value)
        self._transform_bias = float(value)

    @property
    def init_range(self) -> float:
        """The bound of what reset_parameters draws."""
        return self._init_range

    @init_range.setter
    def init_range(self, value: float) -> None:
        _check_range(value)
        self._init_range = float(value)

    @property
    def depth(self) -> int:
        """Micro-steps in each time step; the weights are made for as many, so it cannot be set."""
        return self._depth

    @property
    def _gates(self) -> int:
        return 2 if self.couple_carry else 3

    def _highway(self) -> tuple[int, int, bool]:
        """As ``dispatch.choose`` takes it."""
        masked = self.training and self.variational_state > 0
        return self.depth, self._gates, masked and not self.tie_gate_masks

    def reset_parameters(self) -> None:
        """Draw all parameters anew: U(-init_range, init_range), but the biases of the gates t and
        c, which are transform_bias and -transform_bias."""
        hidden = self.hidden_size
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                nn.init.uniform_(parameter, -self.init_range, self.init_range)
                if name.startswith("bias"):
                    parameter[:, hidden : 2 * hidden] = self.transform_bias
                    parameter[:, 2 * hidden :] = -self.transform_bias

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, depth={self.depth}"
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0,
            "bidirectional": False, "couple_carry": True, "transform_bias": -2.0,
            "variational_input": 0.0, "variational_state": 0.0, "tie_gate_masks": True,
            "init_range": 0.04, "recompute": False,
        }  # fmt: skip
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                text += f", {name}={value}"
        return text

    def _cell(self) -> str:
        return "rhn"

    def _natively_recorded(self, input: Any, hx: Any) -> Any:
        # The general way draws masks.
        if not self._variational_input == self._variational_state == self._dropout == 0:
            return None
        return super()._natively_recorded(input, hx)

    def _draws(self) -> bool:
        # As above of what is wrong.
        plain = self.variational_input == self.variational_state == self.dropout == 0
        return self.training and not plain

    def _takes(self, x: Any, h: Any, c: Any, ranks: tuple[int, ...]) -> bool:
        return super()._takes(x, h, c, ranks) and x.dtype in (torch.float32, torch.float64)

    def _native_call(
        self, sizes: tuple[int, int, int, int], x: Tensor, layout: Layout
    ) -> RhnNativeCall:
        return RhnNativeCall(self._options(), self._cell(), sizes, x, layout)

    def _training_call(self, input: Tensor, layout: Layout) -> RhnTrainingCall:
        return RhnTrainingCall(self._options(), self._cell(), self._sizes(), input, layout)

    def _still(self, call: Any, sequence: bool) -> Any:
        known = super()._still(call, sequence)
        return known if known is not None and known.options == self._options() else None

    def _options(self) -> tuple[bool, bool, bool]:
        """What of the module's options decides what weights it has."""
        return self.couple_carry, self.bias, self.bidirectional

    def _call(self, input: Tensor, parts: Parts | None, **options: Any) -> Any:
        options.pop("return_cells", None)
        output, h_n = functional.rhn(
            input,
            None if parts is None else parts[0],
            self._present_weights(),
            couple_carry=self.couple_carry,
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            variational_input=self.variational_input,
            variational_state=self.variational_state,
            tie_gate_masks=self.tie_gate_masks,
            recompute=self.recompute,
            cache=self._cache(),
            **options,
        )
        return output, (h_n,)


def _check_range(value: Any) -> None:
    check_number("init_range", value)
    if value < 0:
        raise ValueError(f"init_range: got {value}, expected 0 or more")


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
