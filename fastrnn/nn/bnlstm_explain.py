"""Where a call of a batch-normalised layer runs, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import dispatch
from fastrnn.backends import PLANS
from fastrnn.functional.bnlstm import check_layers, describe_problem
from fastrnn.sequence import describe


def explain_bnlstm(
    module: Any,
    input: Tensor | PackedSequence,
    hx: Any,
    lengths: Any,
    reset: Tensor | None,
    return_cells: bool,
) -> dispatch.Explanation:
    """What ``fastrnn.explain`` says of this module."""
    batch_sizes: Tensor | None = None
    if isinstance(input, PackedSequence):
        batch_sizes, input = input.batch_sizes, input.data
    elif input.dim() == 2:
        where = 0 if module.batch_first else 1
        input = input.unsqueeze(where)
        if reset is not None and reset.dim() == 1:
            reset = reset.unsqueeze(where)
    batch = describe(
        input, batch_first=module.batch_first, batch_sizes=batch_sizes, lengths=lengths,
        reset=reset,
    )  # fmt: skip
    states = [] if hx is None else module._split(hx)
    tensors = [input, *states, *module.parameters()]
    records = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    half, sequence = dispatch.autocast_dtype(input), module.input_stats == "sequence"
    check_layers(input, module._weights(), module._statistics(), module.bias, module.num_layers,
           2 if module.bidirectional else 1, sequence, half is not None)  # fmt: skip
    dtype = half or input.dtype
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    over_group = module.training and module.process_group is not None
    problem = describe_problem(
        input, dtype, batch, module.hidden_size, 2 if module.bidirectional else 1,
        module.num_layers, records, return_cells, over_group,
    )  # fmt: skip
    found = dispatch.decide(problem)
    plan = "a Python loop over the steps"
    if found.backend == "cpu":
        from fastrnn.backends import cpu_bnlstm

        shape = (batch.steps, batch.size)
        texts = [
            cpu_bnlstm.plan(shape, inputs, module.hidden_size, problem.directions, wide)
            for _, inputs in module._layers()
        ]
        plan = "; ".join(dict.fromkeys(texts))
    elif found.backend in ("cuda", "triton"):
        plan = PLANS[found.backend](problem)
    elif over_group:
        plan += ", all-reduced statistics at each"
    if wide != dtype and found.backend != "cuda":
        plan = f"{dtype} converted to {wide} and back, ".replace("torch.", "") + plan
    return dispatch.Explanation(found.backend, plan, found.reason, found.rejected)
