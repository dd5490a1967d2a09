"""BNLSTM: the LSTM whose pre-activations and output are batch-normalised, step by step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrnn import functional
from fastrnn.functional.checks import check_number, check_process_group, check_settings
from fastrnn.nn.base import Parts, RecurrentBase
from fastrnn.nn.bnlstm_call import natively_recorded
from fastrnn.nn.bnlstm_explain import explain_bnlstm
from fastrnn.nn.bnlstm_inference import natively, step_natively
from fastrnn.nn.bnlstm_options import BNLSTMOptions, check_input_stats
from fastrnn.nn.cache import PackedCache
from fastrnn.nn.hooked import compute_hooked_weights
from fastrnn.nn.statistics import RunningStatistics, listed
from fastrnn.sequence import first_of


class _Stream(NamedTuple):
    """The state of ``BNLSTM.step``: h and c, and how many steps were taken."""

    h: Tensor
    c: Tensor
    taken: int


class BNLSTM(BNLSTMOptions, RunningStatistics):
    r"""A stack of batch-normalised LSTM layers (Cooijmans et al. 2016, arXiv:1603.09025).

    Each layer computes, for every step t, with gates in the order i, f, g, o::

        z_t = BN(W_hh h_{t-1}; gamma_hh) + BN(W_ih x_t; gamma_ih) + bias
        i_t = sigmoid(z_i)   f_t = sigmoid(z_f)   g_t = tanh(z_g)   o_t = sigmoid(z_o)
        c_t = f_t * c_{t-1} + i_t * g_t
        h_t = o_t * tanh(BN(c_t; gamma_c) + beta_c)
        BN(u; gamma) = gamma * (u - mean) / sqrt(var + eps)

    Mean and biased variance are over the batch, apart for every step; gamma, beta and bias are
    shared by all steps. The cell that is carried on is not normalised. In training the statistics
    are the batch's and running estimates follow them, in eval they are the running ones:
    running = (1 - momentum) * running + momentum * batch. Steps are counted in the order a
    direction processes them, from each sequence's own first step; steps beyond max_length
    normalise with the last row in eval and are not recorded in training. A step that fewer than
    two sequences reach, and so every step of a batch of one, takes the running statistics in
    training too (mean 0 and variance 1 before any batch) and changes nothing. In the shapes T is
    the number of steps, N the batch, I input_size, H hidden_size, L num_layers, D 2 if
    bidirectional else 1.

    Args:
        input_size: I, features of x_t.
        hidden_size: H, features of h_t and c_t.
        num_layers: L; layer k > 0 reads the (D * H) outputs of layer k - 1.
        bias: False leaves out bias (and with it forget_bias).
        batch_first: input and output are (N, T, features); states are not affected.
        dropout: probability of zeroing each output of all layers but the last, in training.
        bidirectional: a second set of weights and statistics reads the sequence from its end.
        device, dtype: of the parameters and buffers.
        max_length: number of steps with statistics of their own, usually the training length.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics; None: their mean over batches.
        gamma_init: initial value of the three gammas; the paper's 0.1 keeps tanh unsaturated.
        forget_bias: initial value of bias's forget slice, the rest is 0.
        input_stats: "step", or "sequence": one statistic of W_ih x over all steps, as the paper
            has it for padded text; its buffers are (1, 4H).
        learn_init_state: make the initial states parameters; zeros at first.
        h0_noise: standard deviation of noise added to h_0, in training and where hx is None. A
            first step from equal states has no variance to divide by; the paper adds 0.1.
        process_group: statistics over all ranks of this torch.distributed group. Runs step by
            step in PyTorch, two collectives for each statistic; all ranks must make the call.

    Call `bnlstm(input, hx=None, *, lengths=None, reset=None, return_cells=False)`:
        input: (T, N, I), (N, T, I) if batch_first, (T, I) unbatched, or a PackedSequence.
        hx: (h_0, c_0) of (D * L, N, H) each, without N if unbatched; zeros or the learned ones
            if None.
        lengths: N integers in 1..T for a batch padded at the right, in any order. Statistics are
            over the sequences that reach a step; outputs past a sequence's end are 0, the final
            state is that of its last step, and the reverse direction starts there.
        reset: bool (T, N), or (N, T) if batch_first; where True, h and c are zeroed in every
            layer and direction before step t is processed.
        return_cells: also return c_t of every step.

    Returns (output, (h_n, c_n)), or (output, (h_n, c_n), cells):
        output: (T, N, D * H), of the last layer, directions side by side, laid out as the input
            is; a PackedSequence if the input is one.
        h_n, c_n: (D * L, N, H), the states after the last step.
        cells: (T, N, D * H), c_t of the last layer, laid out as output.

    Raises what fastrnn.LSTM raises. Running statistics change only if a call succeeds.

    Parameters, layer k, with `_reverse` appended for the second direction:
        weight_ih_l{k} (4H, I or D * H), weight_hh_l{k} (4H, H): from U(-1/sqrt(H), 1/sqrt(H)), as
        torch.nn.LSTM's; bias_l{k} (4H); bn_weight_ih_l{k} (4H), bn_weight_hh_l{k} (4H),
        bn_weight_c_l{k} (H): gamma_init; bn_bias_c_l{k} (H): 0; h_0_l{k} (H), c_0_l{k} (H) if
        learn_init_state. The two norms of z_t have no shift of their own: bias carries both.
    Buffers: running_mean_ih_l{k}, running_var_ih_l{k}, running_mean_hh_l{k}, running_var_hh_l{k}
        (max_length, 4H), running_mean_c_l{k}, running_var_c_l{k} (max_length, H) and
        num_batches_tracked_l{k} (max_length,).
    """

    _packed: PackedCache | None = None

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
        max_length: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gamma_init: float = 0.1,
        forget_bias: float = 1.0,
        input_stats: str = "step",
        learn_init_state: bool = False,
        h0_noise: float = 0.0,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        for name, flag in (
            ("bias", bias),
            ("batch_first", batch_first),
            ("bidirectional", bidirectional),
            ("learn_init_state", learn_init_state),
        ):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")
        for name, size in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
            ("max_length", max_length),
        ):
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        check_settings(dropout, eps, momentum, h0_noise)
        check_number("gamma_init", gamma_init)
        check_number("forget_bias", forget_bias)
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout acts between layers, so non-zero dropout expects num_layers greater than "
                f"1, but got dropout={dropout} and num_layers={num_layers}",
                stacklevel=2,
            )
        check_input_stats(input_stats)
        check_process_group(process_group)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self._dropout = float(dropout)
        self.bidirectional = bidirectional
        self._max_length = max_length
        self._eps = repr(float(eps))
        self._momentum = None if momentum is None else float(momentum)
        self._gamma_init = float(gamma_init)
        self._forget_bias = float(forget_bias)
        self._input_stats = input_stats
        self.learn_init_state = learn_init_state
        self._h0_noise = float(h0_noise)
        self._process_group = process_group

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        gates = 4 * hidden_size
        self._weight_names: list[str] = []
        self._state_names: tuple[list[str], list[str]] = ([], [])
        self._statistic_names: list[str] = []
        for suffix, inputs in self._layers():
            weights: list[tuple[str, tuple[int, ...]]]
            weights = [("weight_ih", (gates, inputs)), ("weight_hh", (gates, hidden_size))]
            weights += [("bias", (gates,))] * bias
            weights += [("bn_weight_ih", (gates,)), ("bn_weight_hh", (gates,))]
            weights += [("bn_weight_c", (hidden_size,)), ("bn_bias_c", (hidden_size,))]
            for name, shape in weights:
                self._weight_names.append(name + suffix)
                self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, **factory)))
            for names, name in zip(self._state_names, ("h_0", "c_0")):
                if learn_init_state:
                    names.append(name + suffix)
                    state = nn.Parameter(torch.empty(hidden_size, **factory))
                    self.register_parameter(name + suffix, state)
            for term, width in (("ih", gates), ("hh", gates), ("c", hidden_size)):
                rows = 1 if term == "ih" and input_stats == "sequence" else max_length
                for kind in ("mean", "var"):
                    self._statistic_names.append(f"running_{kind}_{term}{suffix}")
                    empty = torch.empty((rows, width), **factory)
                    self.register_buffer(self._statistic_names[-1], empty)
            self._statistic_names.append("num_batches_tracked" + suffix)
            tracked = torch.empty(max_length, dtype=torch.int64, device=device)
            self.register_buffer(self._statistic_names[-1], tracked)
        self.reset_parameters()

    def _layers(self) -> Iterator[tuple[str, int]]:
        """The suffix of each layer and direction, and its number of inputs."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        for k in range(self.num_layers):
            for direction in directions:
                inputs = len(directions) * self.hidden_size if k else self.input_size
                yield f"_l{k}{direction}", inputs

    def reset_parameters(self) -> None:
        """Draw the weights anew and forget all statistics."""
        bound = 1 / math.sqrt(self.hidden_size)
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("weight"):
                    parameter.uniform_(-bound, bound)
                elif name.startswith("bn_weight"):
                    parameter.fill_(self.gamma_init)
                else:
                    parameter.zero_()
                if name.startswith("bias"):
                    parameter[self.hidden_size : 2 * self.hidden_size].fill_(self.forget_bias)
        self.reset_running_stats()

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, max_length={self.max_length}"
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                text += f", {name}={value!r}"
        return text + (", process_group=..." if self.process_group is not None else "")

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_packed", None)
        return state

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.flatten_parameters()  # torch swaps no tensor that a weak reference looks at
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.flatten_parameters()
        super()._load_from_state_dict(*args, **kwargs)
        self.flatten_parameters()

    def _replicate_for_data_parallel(self) -> BNLSTM:
        replica = super()._replicate_for_data_parallel()
        replica._packed = None
        return replica

    def _weights(self) -> list[Any]:
        return listed(self, self._parameters, self._weight_names)

    def _name(self) -> str:
        return "BNLSTM"

    def _split(self, hx: Any) -> Parts:
        pair = isinstance(hx, (tuple, list)) and all(isinstance(part, Tensor) for part in hx)
        if pair and len(hx) == 2:
            return hx[0], hx[1]
        got = f"{len(hx)} of them" if pair else type(hx).__name__
        raise TypeError(f"BNLSTM: hx should be a pair of tensors (h_0, c_0), got {got}")

    def _join(self, parts: Parts) -> Any:
        return parts

    def _check_return_cells(self, return_cells: bool) -> None:
        """A BNLSTM has a cell state to return."""

    def check_forward_args(self, data: Tensor, hidden: Parts, batch_sizes: Tensor) -> None:
        """What must hold before the states are put into the order of the packed sequences."""
        layers = self.num_layers * (2 if self.bidirectional else 1)
        expected = (layers, int(batch_sizes[0]), self.hidden_size)
        for i, state in enumerate(hidden):
            if state.shape != expected:
                raise RuntimeError(f"Expected hidden[{i}] size {expected}, got {list(state.shape)}")

    # The call around the arithmetic is that of the other modules.
    flatten_parameters: Any = RecurrentBase.flatten_parameters
    forward: Any = RecurrentBase.forward
    _cache: Any = RecurrentBase._cache
    _check_rank: Any = RecurrentBase._check_rank
    _forward_packed: Any = RecurrentBase._forward_packed
    _explain: Any = explain_bnlstm
    _natively: Any = natively
    _natively_recorded: Any = natively_recorded
    _rank_message: Any = RecurrentBase._rank_message

    def _initial(
        self, input: Tensor, batch_sizes: Tensor | None, batch_first: bool
    ) -> Parts | None:
        """The learned initial states of every sequence, or None."""
        if not self.learn_init_state:
            return None
        if not self._state_names[0]:
            raise ValueError(
                "learn_init_state: got True, but the module was made without, and has no h_0 and "
                "c_0 to learn; construct it with learn_init_state=True"
            )
        if batch_sizes is not None:
            size = first_of(batch_sizes)
        else:
            size = input.size(0 if batch_first else 1)
        return tuple(
            torch.stack([getattr(self, name) for name in names]).unsqueeze(1).expand(-1, size, -1)
            for names in self._state_names
        )

    def _call(self, input: Tensor, parts: Parts | None, **options: Any) -> Any:
        batch_first, batch_sizes = options["batch_first"], options.get("batch_sizes")
        noise = self.h0_noise if self.training and parts is None else 0.0
        momentum = self.momentum
        if self._recalibrates:
            options.update(training=False, batch_stats=True)
            noise, momentum = 0.0, None
        if parts is None:
            parts = self._initial(input, batch_sizes, batch_first)
        options.setdefault("training", self.training)
        output, h_n, c_n, *cells = functional.bnlstm(
            input,
            None if parts is None else (parts[0], parts[1]),
            self._weights(),
            self._statistics(),
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            eps=self.eps,
            momentum=momentum,
            input_stats=self.input_stats,
            h0_noise=noise,
            process_group=self.process_group,
            cache=self._cache(),
            **options,
        )
        return (output, (h_n, c_n), *cells)

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Process one time step: the same as the whole sequence, one call per element of it.

        In training the statistics are those of this step's batch, and the running ones follow.
        Forward hooks are not run, but for those of torch's weight_norm, spectral_norm and pruning.

        Args:
            x_t: (N, I), or (I,) for one sequence without a batch dimension.
            state: what the last call returned; it carries the number of steps taken. None: a new
                sequence begins.

        Returns:
            y_t: (N, H) or (H,), the output of the last layer.
            state: to be passed to the next call, opaque.

        Raises:
            ValueError: the module is bidirectional, x_t is neither (N, I) nor (I,), or
                input_stats="sequence" in training, which needs all steps at once.
            TypeError: state is not what step returned.
        """
        if self._forward_pre_hooks:
            compute_hooked_weights(self)
        if not torch.is_grad_enabled() and (state is None or isinstance(state, _Stream)):
            taken = 0 if state is None else state.taken
            done = step_natively(self, x_t, None if state is None else (state.h, state.c), taken)
            if done is not None:
                h, c = done[1]
                return done[0], _Stream(h, c, taken + 1)
        if self.bidirectional:
            raise ValueError(
                "BNLSTM.step: bidirectional=True, expected a module of one direction; the "
                "reverse direction starts at the end of the sequence: call the module on all of it"
            )
        if self.training and self.input_stats == "sequence":
            raise ValueError(
                "BNLSTM.step: input_stats='sequence' takes its statistics over all steps, which a "
                "single step in training does not have; call eval() first"
            )
        if not isinstance(x_t, Tensor):
            raise TypeError(f"BNLSTM.step: x_t should be a Tensor, got {type(x_t).__name__}")
        rank = x_t.dim()
        if rank not in (1, 2):
            raise ValueError(f"BNLSTM.step: Expected x_t to be 1D or 2D, got {rank}D instead")
        if state is not None and not isinstance(state, _Stream):
            raise TypeError(
                f"BNLSTM.step: state should be what step returned, or None at the start of a "
                f"sequence, got {type(state).__name__}"
            )
        taken = 0 if state is None else state.taken
        parts: Parts | None = None if state is None else (state.h, state.c)
        if parts is not None:
            self._check_rank(parts, rank + 1)
        if rank == 1:
            x_t = x_t.unsqueeze(0)
            if parts is not None:
                parts = tuple(part.unsqueeze(1) for part in parts)
        time_dim = 1 if self.batch_first else 0
        output, parts = self._call(
            x_t.unsqueeze(time_dim), parts, batch_first=self.batch_first, first_step=taken
        )
        output = output.squeeze(time_dim)
        if rank == 1:
            output = output.squeeze(0)
            parts = tuple(part.squeeze(1) for part in parts)
        return output, _Stream(parts[0], parts[1], taken + 1)


_DEFAULTS = {
    "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False,
    "eps": 1e-5, "momentum": 0.1, "gamma_init": 0.1, "forget_bias": 1.0, "input_stats": "step",
    "learn_init_state": False, "h0_noise": 0.0,
}  # fmt: skip
