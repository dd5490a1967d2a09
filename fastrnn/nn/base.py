"""What LSTM, GRU and RNN share: arguments, state and the packed-weight cache around one call.

The classes stand on `torch.nn.RNNBase`, which creates the parameters and owns the checks and their
messages; they do not subclass nn.LSTM, nn.GRU or nn.RNN because dynamo breaks the graph on those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from fastrnn.nn.cache import PackedCache, current_cache
from fastrnn.nn.traced import Proxy, as_leaf
from fastrnn.regularisers import check, probability
from fastrnn.sequence import check_strided

Parts = tuple[Tensor, ...]  # the state inside this file: (h,) for GRU and RNN, (h, c) for LSTM


def computes_weights(module: nn.Module) -> bool:
    """Whether torch computes weights as they are read. The general way reads them once: what a call
    saves is then the same in each, as checkpoints demand, and nothing is computed in vain."""
    return "parametrizations" in module._modules


def _initial_norm(name: str, values: Tensor) -> Tensor:
    return values.fill_(0.0 if name.startswith("ln_bias") else 1.0)


class RecurrentBase(nn.RNNBase):
    """A stack of recurrent layers: everything but the cell. Not for direct use."""

    recompute: bool = False
    layer_norm: bool = False
    recurrent_dropout_mode: str
    # Class attributes also for pickles of versions without them.
    recurrent_dropout_per: str = "step"
    # Probabilities are kept as text: a float attribute is a symbol to torch.compile, which no
    # operator's description of its masks can hold.
    _rates: tuple[str, ...] = ()  # recurrent_dropout, zoneout of h, of c, weight_dropout; () for 0
    _zoneout_pair: bool = False
    # A class attribute, because RNNBase.__init__ and unpickling reach flatten_parameters() early.
    _packed: PackedCache | None = None

    def __init__(
        self,
        mode: str,
        *args: Any,
        recompute: bool = False,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_mode: str,
        recurrent_dropout_per: str = "step",
        zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        for name, flag in (("recompute", recompute), ("layer_norm", layer_norm)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")
        check(
            mode.split("_")[0].lower(), recurrent_dropout, recurrent_dropout_mode,
            recurrent_dropout_per, zoneout, weight_dropout,
        )  # fmt: skip
        super().__init__(mode, *args, **kwargs)
        self.recompute = recompute
        self.recurrent_dropout = recurrent_dropout
        self.recurrent_dropout_mode = recurrent_dropout_mode
        self.recurrent_dropout_per = recurrent_dropout_per
        self.zoneout = zoneout
        self.weight_dropout = weight_dropout
        self.layer_norm = layer_norm
        if layer_norm:
            self._add_norms()

    def _add_norms(self) -> None:
        """Register the parameters of layer norm, after those of torch in each direction's list."""
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            like = getattr(self, names[0])
            rows, hidden = like.size(0), self.hidden_size
            added = {f"ln_weight_ih{suffix}": rows, f"ln_weight_hh{suffix}": rows}
            if self.mode == "LSTM":
                added |= {f"ln_weight_c{suffix}": hidden, f"ln_bias_c{suffix}": hidden}
            for name, size in added.items():
                self.register_parameter(
                    name, nn.Parameter(_initial_norm(name, like.new_empty(size)))
                )
            names.extend(added)
        self._flat_weights_names = [name for names in self._all_weights for name in names]

    def reset_parameters(self) -> None:
        """Draw new values: torch.nn's, and gains of 1 and biases of 0 for layer norm."""
        bound = self.hidden_size**-0.5 if self.hidden_size > 0 else 0.0
        norms = {name for name in self._flat_weights_names if name.startswith("ln_")}
        for name, parameter in self.named_parameters():
            own = norms.intersection(name.split("."))  # parts: it may be parametrised
            if own:
                _initial_norm(own.pop(), parameter.detach())
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def _rate(self, index: int) -> float:
        return float(self._rates[index]) if self._rates else 0.0

    def _set_rates(self, first: int, *values: float) -> None:
        rates = list(self._rates or ("0.0",) * 4)
        rates[first : first + len(values)] = [repr(value) for value in values]
        self._rates = tuple(rates) if any(float(rate) for rate in rates) else ()

    @property
    def recurrent_dropout(self) -> float:
        """Probability of recurrent dropout."""
        return self._rate(0)

    @recurrent_dropout.setter
    def recurrent_dropout(self, value: float) -> None:
        self._set_rates(0, probability("recurrent_dropout", value))

    @property
    def zoneout(self) -> float | tuple[float, float]:
        """Probability of zoneout, or those of h and c."""
        return (self._rate(1), self._rate(2)) if self._zoneout_pair else self._rate(1)

    @zoneout.setter
    def zoneout(self, value: float | tuple[float, float]) -> None:
        pair = isinstance(value, (tuple, list))
        if pair and len(value) != 2:  # type: ignore[arg-type]
            raise ValueError(
                f"zoneout: got {len(value)} values, expected p or (p_h, p_c)"  # type: ignore[arg-type]
            )
        if pair and self.mode not in ("LSTM", "RHN"):  # an RHN has no zoneout at all
            check(self._name().lower(), zoneout=value)
        h, c = value if pair else (value, value)  # type: ignore[misc]
        self._set_rates(1, probability("zoneout", h), probability("zoneout", c))
        self._zoneout_pair = pair

    @property
    def weight_dropout(self) -> float:
        """Probability of weight dropout."""
        return self._rate(3)

    @weight_dropout.setter
    def weight_dropout(self, value: float) -> None:
        self._set_rates(3, probability("weight_dropout", value))

    def extra_repr(self) -> str:
        text = super().extra_repr() + (", recompute=True" if self.recompute else "")
        text += ", layer_norm=True" if self.layer_norm else ""
        for name, value in self._regulariser_options().items():
            plain = getattr(type(self), name) if isinstance(value, str) else 0
            text += "" if value == plain else f", {name}={value!r}"
        return text

    def _regulariser_options(self) -> dict[str, Any]:
        """The options of the cell's function; none where they change nothing."""
        if not self._rates:
            return {}
        return {
            "recurrent_dropout": self.recurrent_dropout,
            "recurrent_dropout_mode": self.recurrent_dropout_mode,
            "recurrent_dropout_per": self.recurrent_dropout_per,
            "zoneout": self.zoneout,
            "weight_dropout": self.weight_dropout,
        }

    def _active_regularisers(self) -> str:
        """Names those that act in the module's present mode; "" if none does."""
        options = self._regulariser_options()
        if not options:
            return ""
        regularisers = check(self._name().lower(), *options.values())
        return str(regularisers) if regularisers.active(self.training) else ""

    def _weights(self) -> list[Any]:
        names, parameters = self._flat_weights_names, self._parameters
        try:
            return [parameters[name] for name in names]
        except KeyError:  # parametrised, pruned, weight-normed, replicated or deleted
            return [getattr(self, name, None) for name in names]

    # RNNBase keeps a list that has to be refreshed whenever a weight is replaced; reading the
    # weights anew each time is always in step and holds on to no tensor of a finished transform.
    @property
    def _flat_weights(self) -> list[Any]:
        return self._weights()

    @_flat_weights.setter
    def _flat_weights(self, value: Sequence[Any]) -> None:
        pass

    def _update_flat_weights(self) -> None:
        """Nothing to refresh: `_flat_weights` reads the weights anew each time."""

    def flatten_parameters(self) -> None:
        """Drop the packed copies of the weights that inference keeps between calls.

        Safe anywhere. On a CPU it has one use: after writing to a few elements of a parameter
        through `.data`, which no version counter sees. On a GPU it also does what torch.nn's does
        for cuDNN, which serves the calls that torch's own kernels run.
        """
        if self._packed is not None:
            self._packed.clear()
        # BNLSTM borrows this, which is no RNNBase.
        if isinstance(self, torch.nn.RNNBase) and self.mode != "RHN" and not self.layer_norm:
            torch.nn.RNNBase.flatten_parameters(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self._packed is not None:  # torch swaps no tensor that a weak reference looks at
            self._packed.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # As in _apply, for what is loaded by swapping; torch's own layers keep theirs and fail.
        if self._packed is not None:
            self._packed.clear()
        self._flat_weight_refs = []
        super()._load_from_state_dict(*args, **kwargs)
        self._init_flat_weights()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_packed", None)
        return state

    def __setstate__(self, d: dict[str, Any]) -> None:
        super().__setstate__(d)
        self.__dict__.pop("_flat_weights", None)  # comes with a pickle of torch.nn's own class

    def _replicate_for_data_parallel(self) -> RecurrentBase:
        replica = super()._replicate_for_data_parallel()
        replica._packed = None
        return replica

    def _cache(self) -> PackedCache | None:
        return None if is_compiling() else current_cache(self)

    def _name(self) -> str:
        return self.mode.split("_")[0]

    def _split(self, hx: Any) -> Parts:
        if isinstance(hx, Tensor):
            return (hx,)
        raise TypeError(f"{self._name()}: hx should be a Tensor, got {type(hx).__name__}")

    def _join(self, parts: Parts) -> Any:
        return parts[0]

    def _rank_message(self, rank: int) -> str:
        return f"{self._name()}: Expected input to be 2D or 3D, got {rank}D instead"

    def _check_rank(self, parts: Parts, rank: int) -> None:
        for i, part in enumerate(parts):
            if part.dim() != rank:
                kind = "batched 3-D" if rank == 3 else "unbatched 2-D"
                ranks = [f"{part.dim()}-D" for part in parts]
                names, got = "hx", f"{ranks[0]} tensor"
                if len(parts) == 2:
                    names, got = "hx and cx", f"({', '.join(ranks)}) tensors"
                raise RuntimeError(
                    f"For {kind} input, {names} should also be {rank}-D but got {got}"
                )
            if part.layout is not torch.jagged:  # of which torch.nn says that its sizes do not fit
                check_strided("hx" if len(parts) == 1 else f"hx[{i}]", part)

    def _present_weights(self) -> list[Tensor]:
        weights = self._weights()
        for weight in weights:
            if weight is None:
                names = zip(self._flat_weights_names, weights)
                missing = ", ".join(name for name, value in names if value is None)
                raise AttributeError(
                    f"{self._name()}: {missing} was deleted; assign a Parameter before the call"
                )
        return weights

    def _check_return_cells(self, return_cells: bool) -> None:
        if return_cells:
            raise ValueError(
                f"{self._name()}: return_cells=True, but {self._name()} has no cell state; "
                "the hidden states of all steps are the output itself"
            )

    def _natively(self, input: Any, hx: Any) -> Any:
        """A call without gradients straight to the CPU library; None: take the general way."""
        return None

    def _natively_recorded(self, input: Any, hx: Any) -> Any:
        """As `_natively`, with gradients."""
        return None

    def _call(self, input: Tensor, parts: Parts | None, **options: Any) -> Any:
        """Run the cell's function: (output, parts of the state[, cells]). The function makes
        torch.nn's checks of sizes, dtypes and devices, and those of the options."""
        raise NotImplementedError

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Sequence[int] | Tensor | None = None,
        reset: Tensor | None = None,
        return_cells: bool = False,
    ) -> Any:
        """Run the whole sequence. The class says what goes in and what comes out."""
        # Dynamo guards what it meets: it is told here that none of the short ways is its.
        bare = lengths is None and reset is None and not return_cells
        if bare and not is_compiling() and not computes_weights(self):
            short = self._natively_recorded if torch.is_grad_enabled() else self._natively
            done = short(input, hx)
            if done is not None:
                return done
        self._check_return_cells(return_cells)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, reset, return_cells)
        if not isinstance(input, Tensor) and isinstance(input, Proxy):
            cells = None if return_cells is False else return_cells
            leaf = as_leaf(self, input, hx, lengths=lengths, reset=reset, return_cells=cells)
            if leaf is not None:
                return leaf
        if not isinstance(input, Tensor):
            raise TypeError(
                f"{self._name()}: input should be a Tensor or a PackedSequence, "
                f"got {type(input).__name__}"
            )
        rank = input.dim()
        if rank not in (2, 3):
            raise ValueError(self._rank_message(rank))
        batch_dim = 0 if self.batch_first else 1
        parts = None if hx is None else self._split(hx)
        if parts is not None:
            self._check_rank(parts, rank)
        if rank == 2:
            input = input.unsqueeze(batch_dim)
            if parts is not None:
                parts = tuple(part.unsqueeze(1) for part in parts)
            if isinstance(reset, Tensor) and reset.dim() == 1:
                reset = reset.unsqueeze(batch_dim)
        output, parts, *cells = self._call(
            input,
            parts,
            batch_first=self.batch_first,
            lengths=lengths,
            reset=reset,
            return_cells=return_cells,
        )
        if rank == 2:
            output = output.squeeze(batch_dim)
            parts = tuple(part.squeeze(1) for part in parts)
            cells = [value.squeeze(batch_dim) for value in cells]
        return (output, self._join(parts), *cells)

    def _forward_packed(
        self, packed: PackedSequence, hx: Any, lengths: Any, reset: Any, return_cells: bool
    ) -> Any:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        parts = None if hx is None else self._split(hx)
        if parts is not None:
            self._check_rank(parts, 3)
            # Before the permutation, which would pick rows out of a state of too many. How many
            # there are a traced call does not know.
            if not is_compiling():
                self.check_forward_args(data, self._join(parts), batch_sizes)
        if parts is not None and sorted_indices is not None:
            parts = tuple(part.index_select(1, sorted_indices) for part in parts)
        output, parts, *cells = self._call(
            data,
            parts,
            batch_first=False,
            batch_sizes=batch_sizes,
            lengths=lengths,
            reset=reset,
            return_cells=return_cells,
        )
        if unsorted_indices is not None:
            parts = tuple(part.index_select(1, unsorted_indices) for part in parts)
        output, *cells = (
            PackedSequence(value, batch_sizes, sorted_indices, unsorted_indices)
            for value in (output, *cells)
        )
        return (output, self._join(parts), *cells)
