"""A training step of a batch-normalised layer whose shape was seen before, as in
`fastrnn.nn.stepper`: everything but the data is prepared once, since a large layer pushes the
interpreter out of the caches, and what is left of Python costs several times what it costs alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn import dispatch
from fastrnn.autograd import PreparedBNLSTMLayer
from fastrnn.backends.cpu_bnlstm import BNLSTMCall, follow
from fastrnn.backends.cpu_prepared import library
from fastrnn.functional.bnlstm import STATISTICS, check_layers, describe_problem
from fastrnn.nn.stepper import PLAIN, TENSOR
from fastrnn.sequence import Batch

_Layouts = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def layouts_of(tensors: list[Any]) -> _Layouts:
    return tuple((t.shape, t.dtype) for t in tensors)


def settings_of(module: Any) -> tuple[Any, ...]:
    """What of a module's options decides a call."""
    return module.eps, module._input_stats, module.batch_first, module.bidirectional, module.bias


class TrainingCall:
    """Calls of one module for inputs like ``x`` (3-D, dense), with weights and statistics of these
    shapes."""

    def __init__(self, module: Any, x: Tensor, weights: list[Any], statistics: list[Any]) -> None:
        self._settings = settings_of(module)
        directions, hidden = 2 if module.bidirectional else 1, module.hidden_size
        size = x.size(0 if module.batch_first else 1)
        self._x, self._weights = (x.shape, x.dtype), layouts_of(weights)
        self._statistics = layouts_of(statistics)
        self._zeros = x.new_zeros((directions, size, hidden))
        self._state = layouts_of([self._zeros] * 2)
        self._call = BNLSTMCall(
            x, hidden, directions, module.batch_first, module.input_stats == "sequence", module.eps
        )

    @classmethod
    def make(
        cls, module: Any, x: Tensor, weights: list[Any], statistics: list[Any]
    ) -> TrainingCall | None:
        """None where another backend runs the call or there is one row; raises if a parameter or
        statistic does not fit."""
        steps, size = x.shape[:2][::-1] if module.batch_first else x.shape[:2]
        directions = 2 if module.bidirectional else 1
        if size < 2 or x.dtype not in (torch.float32, torch.float64):
            return None
        if any(not isinstance(t, Tensor) for t in (*weights, *statistics)):
            return None
        hidden = check_layers(
            x, weights, statistics, module.bias, 1, directions, module.input_stats == "sequence",
            False,
        )  # fmt: skip
        batch = Batch(steps, size, module.batch_first, None, None, None)
        problem = describe_problem(x, x.dtype, batch, hidden, directions, 1, True, False, False)
        dtypes = ([x.dtype] * (STATISTICS - 1) + [torch.int64]) * directions
        if dispatch.settle(problem) != "cpu" or [t.dtype for t in statistics] != dtypes:
            return None
        return cls(module, x, weights, statistics)

    def __call__(
        self, module: Any, x: Any, h: Any, c: Any, weights: list[Any], statistics: list[Any]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
        """output and state, or None: take the general way. h and c are None together for zeros."""
        alike = library().all_alike
        if (
            settings_of(module) != self._settings
            or not library().alike(x, TENSOR, *self._x)
            or not alike(weights, PLAIN, self._weights)
            or not alike(statistics, TENSOR, self._statistics)
            or not (h is None or alike((h, c), TENSOR, self._state))
            or torch._C._autograd._profiler_enabled()  # which shows operators
            or torch._C._is_any_autocast_enabled()
            or torch.is_inference_mode_enabled()
            or dispatch.settled() is None
        ):
            return None
        if h is None:
            h = c = self._zeros
        if not any(t.requires_grad for t in (x, h, c, *weights)):
            return None
        used: list[Tensor] = []
        y, h_n, c_n = PreparedBNLSTMLayer.apply(self._call, used, statistics, x, h, c, *weights)
        with torch.no_grad():
            follow(statistics, used, 0, module.momentum)
        return y, (h_n, c_n)


def natively_recorded(module: Any, input: Any, hx: Any) -> Any:
    """A BNLSTM's call with gradients straight to the CPU library; None: take the general way."""
    if (
        not module.training
        or module._recalibrates
        or module.num_layers > 1
        or module.momentum is None
        or module._process_group is not None
        or (hx is None and (module.h0_noise or module.learn_init_state))
        or not (hx is None or (type(hx) is tuple and len(hx) == 2))
    ):
        return None
    cache = module._cache()
    if cache is None:
        return None
    h, c = (None, None) if hx is None else hx
    weights, statistics = module._weights(), module._statistics()
    known = cache.training
    done = None if known is None else known(module, input, h, c, weights, statistics)
    if done is not None:
        return done
    if type(input) is not Tensor or not input.is_cpu or input.dim() != 3 or not input.numel():
        return None
    if input.layout is not torch.strided or input.is_nested or not module.hidden_size:
        return None
    if cache.seen_training != input.shape:  # preparing pays from the second call of a shape on
        cache.seen_training = input.shape
        return None
    known = TrainingCall.make(module, input, weights, statistics)
    done = None if known is None else known(module, input, h, c, weights, statistics)
    if done is not None:
        cache.training = known
    return done
