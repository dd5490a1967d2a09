"""One time step at a time, for streaming inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn.nn.base import RecurrentBase, computes_weights
from fastrnn.nn.hooked import compute_hooked_weights
from fastrnn.nn.stepper import Layout, NativeCall, TrainingCall
from fastrnn.nn.traced import in_one_piece


class Steppable(RecurrentBase):
    """Adds `step`, and the short way to the CPU library for calls of a shape seen before."""

    def _cell(self) -> str:
        """The name the operators know the cell by."""
        return self.mode.lower() + ("_layer_norm" if self.layer_norm else "")

    def _function(self, name: str, options: dict[str, Any]) -> Any:
        """The function of `fastrnn.functional` for a call with these options."""
        bare = True
        for option, value in options.items():
            if option != "batch_first" and value is not None and value is not False:
                bare = False
        return in_one_piece(name, bare and not self._draws())

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Process one time step: the same as the whole sequence, one call per element of it.

        Not so in training with masks that hold for a sequence: each call draws those of
        recurrent_dropout_per="sequence", of weight_dropout and of RHN's variational options anew.

        Weights stay packed between calls made without gradients; changed and replaced parameters
        are noticed. Forward hooks are not run, but for those of torch's weight_norm, spectral_norm
        and pruning, which compute weights. In 16-bit types c is rounded between calls, which inside
        a sequence stays in float32.

        Args:
            x_t: (N, I), or (I,) for one sequence without a batch dimension.
            state: as forward's: h of (num_layers, N, H), for LSTM the pair (h, c), h being
                (num_layers, N, proj_size) with a projection; without N if x_t is (I,). None: zeros.

        Returns:
            y_t: (N, H) or (H,), the output of the last layer; proj_size features with a projection.
            state: to be passed to the next call, shaped as the argument.

        Raises:
            ValueError: the module is bidirectional, or x_t is neither (N, I) nor (I,).
            RuntimeError, ValueError, TypeError: as forward, for sizes, dtypes and devices.
        """
        if self._forward_pre_hooks:
            compute_hooked_weights(self)
        if not torch.is_grad_enabled() and not computes_weights(self):
            done = self._step_natively(x_t, state)
            if done is not None:
                return done
        if self.bidirectional:
            raise ValueError(
                f"{self._name()}.step: bidirectional=True, expected a module of one direction; the "
                "reverse direction starts at the end of the sequence: call the module on all of it"
            )
        if not isinstance(x_t, Tensor):
            got = type(x_t).__name__
            raise TypeError(f"{self._name()}.step: x_t should be a Tensor, got {got}")
        rank = x_t.dim()
        if rank not in (1, 2):
            raise ValueError(
                f"{self._name()}.step: Expected x_t to be 1D or 2D, got {rank}D instead"
            )
        parts = None if state is None else self._split(state)
        if parts is not None:
            self._check_rank(parts, rank + 1)
        if rank == 1:
            x_t = x_t.unsqueeze(0)
            if parts is not None:
                parts = tuple(part.unsqueeze(1) for part in parts)
        time_dim = 1 if self.batch_first else 0
        input = x_t.unsqueeze(time_dim)
        output, parts = self._call(input, parts, batch_first=self.batch_first)
        output = output.squeeze(time_dim)
        if rank == 1:
            output = output.squeeze(0)
            parts = tuple(part.squeeze(1) for part in parts)
        return output, self._join(parts)

    def _step_natively(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any] | None:
        """`step` without gradients on the CPU library; None: take the general way, which also
        says what is wrong with an argument."""
        parts = self._parts(state)
        if parts is None or self.bidirectional or self._draws():
            return None
        if torch.compiler.is_compiling():
            return None
        weights = self._weights()
        known = None if self._packed is None else self._still(self._packed.stepper, False)
        done = None if known is None else known(x_t, *parts, weights, self)
        if done is None:
            cache = self._cache()
            if cache is None or not self._takes(x_t, *parts, (1, 2)):
                return None
            sizes = (self.hidden_size, self.proj_size, 1, self.num_layers)
            # In place only when it has proved to work: concurrent callers may use the old one.
            stepper = self._native_call(sizes, x_t, Layout.step(x_t))
            done = stepper(x_t, *parts, weights, self)
            if done is None:
                return None
            cache.stepper = stepper
        y, h_n, c_n = done
        return y, (h_n, c_n) if self.mode == "LSTM" else h_n

    def _natively(self, input: Any, hx: Any) -> Any:
        parts = self._parts(hx)
        if parts is None or self._draws():
            return None
        weights = self._weights()
        known = None if self._packed is None else self._still(self._packed.sequence, True)
        done = None if known is None else known(input, *parts, weights, self)
        if done is None:
            cache = self._cache()
            if cache is None or not self._takes(input, *parts, (2, 3)):
                return None
            if cache.seen != input.shape:  # preparing pays from the second call of a shape on
                cache.seen = input.shape
                return None
            layout = Layout.sequence(input, self.batch_first)
            sequence = self._native_call(self._sizes(), input, layout)
            done = sequence(input, *parts, weights, self)
            if done is None:
                return None
            cache.sequence = sequence
        y, h_n, c_n = done
        return y, (h_n, c_n) if self.mode == "LSTM" else h_n

    def _natively_recorded(self, input: Any, hx: Any) -> Any:
        if torch.compiler.is_compiling() or self.num_layers > 1 or self.recompute:
            return None
        parts, cache = self._parts(hx), self._cache()
        if parts is None or cache is None or self._active_regularisers():
            return None
        h, c = parts
        weights = self._weights()
        known = self._still(cache.training, True)
        done = None if known is None else known(input, h, c, weights)
        if done is None:
            if not self._takes(input, h, c, (3,)):
                return None
            if cache.seen_training != input.shape:
                cache.seen_training = input.shape
                return None
            training = self._training_call(input, Layout.sequence(input, self.batch_first))
            done = training(input, h, c, weights)
            if done is None:
                return None
            cache.training = training
        return done[0], done[1:] if self.mode == "LSTM" else done[1]

    def _native_call(self, sizes: tuple[int, int, int, int], x: Tensor, layout: Layout) -> Any:
        return NativeCall(self._cell(), sizes, x, layout)

    def _training_call(self, input: Tensor, layout: Layout) -> TrainingCall:
        return TrainingCall(self._cell(), self._sizes(), input, layout)

    def _still(self, call: Any, sequence: bool) -> Any:
        """A prepared call, or None if it was made for other settings of the module."""
        if call is None or call.cell != self._cell():
            return None
        return call if not sequence or call.layout.batch_first == self.batch_first else None

    def _sizes(self) -> tuple[int, int, int, int]:
        directions = 2 if self.bidirectional else 1
        return self.hidden_size, self.proj_size, directions, self.num_layers

    def _draws(self) -> bool:
        """Whether a call draws random numbers, or their expectations take part in it."""
        return self._drops() or bool(self._active_regularisers())

    def _drops(self) -> bool:
        """Whether a call drops outputs between layers."""
        return self.training and self.dropout != 0

    def _parts(self, hx: Any) -> tuple[Any, Any] | None:
        """h and c (None but for an LSTM); both None for the default; None if hx is neither."""
        if hx is None:
            return None, None
        if self.mode != "LSTM":
            return hx, None
        return hx if type(hx) is tuple and len(hx) == 2 and hx[0] is not None else None

    def _takes(self, x: Any, h: Any, c: Any, ranks: tuple[int, ...]) -> bool:
        """Whether these are CPU tensors of the right sizes."""
        if type(x) is not Tensor or not x.is_cpu or x.dim() not in ranks or not x.numel():
            return False
        if x.layout is not torch.strided or x.is_nested:
            return False
        if x.size(-1) != self.input_size or not self.hidden_size:
            return False
        if self.layer_norm and x.dtype is torch.bfloat16:  # widened by the general way
            return False
        if h is None:
            return True
        layers = self.num_layers * (2 if self.bidirectional else 1)
        middle: tuple[int, ...] = x.shape[:-1]  # the batch, where there is one
        if 3 in ranks:
            middle = (x.size(0 if self.batch_first else 1),) if x.dim() == 3 else ()
        out = self.proj_size or self.hidden_size
        for state, size in ((h, out), (c, self.hidden_size)):
            if state is None and state is c:
                continue
            if type(state) is not Tensor or state.is_nested:  # nested ones have no shape
                return False
            if state.shape != (layers, *middle, size):
                return False
        return True
