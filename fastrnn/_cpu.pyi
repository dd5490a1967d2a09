"""Types of the native CPU module, csrc/bindings/cpu.cc: sizes, addresses, rates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_Address = Tensor | int | None

def isa() -> str: ...
def isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def team_kind() -> str: ...
def team_configure(kind: str) -> None: ...
def packed_bytes(problem: tuple[int, ...]) -> int: ...
def pack(problem: tuple[int, ...], weights: tuple[int, ...], packed: int) -> None: ...
def forward_workspace(problem: tuple[int, ...], tensors: tuple[float, ...]) -> int: ...
def forward(problem: tuple[int, ...], tensors: tuple[float, ...], workspace: int) -> None: ...
def backward_workspace(problem: tuple[int, ...], tensors: tuple[float, ...]) -> int: ...
def backward(problem: tuple[int, ...], tensors: tuple[float, ...], workspace: int) -> None: ...
def random(
    seed: int,
    stream: int,
    threshold: int,
    steps: int,
    rows: int,
    units: int,
    threads: int,
    words: int,
    keep: int,
) -> None: ...
def read_words(addresses: bytes) -> bytes: ...
def describe_forward(problem: tuple[int, ...], tensors: tuple[float, ...]) -> object: ...
def describe_backward(problem: tuple[int, ...], tensors: tuple[float, ...]) -> object: ...
def run_forward(
    description: object,
    x: _Address,
    y: _Address,
    cells: _Address,
    h0: _Address,
    c0: _Address,
    h_n: _Address,
    c_n: _Address,
    gates: _Address,
    weights: Sequence[Tensor] | None,
    /,
) -> None: ...
def run_backward(
    description: object,
    x: _Address,
    y: _Address,
    cells: _Address,
    dx: _Address,
    dy: _Address,
    dcells: _Address,
    h0: _Address,
    c0: _Address,
    dh_n: _Address,
    dc_n: _Address,
    dh0: _Address,
    dc0: _Address,
    gates: _Address,
    weights: Sequence[Tensor],
    dweights: Sequence[Tensor] | None,
    /,
) -> None: ...
def alike(
    tensor: object, types: tuple[type, ...], shape: tuple[int, ...], dtype: torch.dtype, /
) -> bool: ...
def unchanged(
    weights: Sequence[Tensor],
    refs: tuple[Any, ...],
    stamps: tuple[tuple[int, int], ...],
    samples: bytes,
    values: bytes,
    /,
) -> bool: ...
def plain_watch(types: tuple[type, ...], quiet: tuple[Any, ...]) -> None: ...
def plain_operators(calls: tuple[Any, ...]) -> None: ...
def plain_setup(
    exchange: Any,
    dtypes: tuple[torch.dtype, ...],
    empty: Any,
    threads: Any,
    forward: Any,
    forward_train: Any,
    backward: Any,
) -> None: ...
def plain_known(
    key: tuple[Any, ...],
    forward: object,
    backward: object,
    outputs: tuple[Any, ...],
    tape: tuple[Any, ...],
    parameters: tuple[Any, ...],
    state_bytes: int,
) -> None: ...
def plain_forward(
    x: Tensor, states: list[Tensor], weights: list[Tensor], cell: str, batch_first: bool, /
) -> list[Tensor]: ...
def plain_forward_train(
    x: Tensor, states: list[Tensor], weights: list[Tensor], cell: str, batch_first: bool, /
) -> list[Tensor]: ...
def plain_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    y: Tensor,
    states: list[Tensor],
    tape: list[Tensor],
    matrices: list[Tensor],
    cell: str,
    batch_first: bool,
    bias: bool,
    need_dx: bool,
    need_dstate: bool,
    need_dw: bool,
    /,
) -> list[Tensor]: ...
def plain_forward_op(*args: Any, **kwargs: Any) -> list[Tensor]: ...
def plain_forward_train_op(*args: Any, **kwargs: Any) -> list[Tensor]: ...
def plain_backward_op(*args: Any, **kwargs: Any) -> list[Tensor]: ...
def measure_peak_flops(threads: int, seconds: float = 0.5) -> float: ...
def measure_bandwidth(threads: int, bytes_per_thread: int, seconds: float = 0.5) -> float: ...
def plan(problem: tuple[int, ...]) -> tuple[int, str]: ...
def rhn_plan(problem: tuple[int, ...]) -> tuple[int, str]: ...
def rhn_packed_bytes(problem: tuple[int, ...]) -> int: ...
def rhn_pack(problem: tuple[int, ...], weights: tuple[int, ...], packed: int) -> None: ...
def rhn_forward_workspace(problem: tuple[int, ...], tensors: tuple[int, ...]) -> int: ...
def rhn_forward(
    problem: tuple[int, ...],
    tensors: tuple[int, ...],
    workspace: int,
    workspace_bytes: int,
    tape_bytes: int,
) -> None: ...
def rhn_backward_workspace(problem: tuple[int, ...], tensors: tuple[int, ...]) -> int: ...
def rhn_backward(
    problem: tuple[int, ...],
    tensors: tuple[int, ...],
    workspace: int,
    workspace_bytes: int,
    w_hh_bytes: int,
) -> None: ...
def bnlstm_tape_width(hidden: int) -> int: ...
def bnlstm_threads(problem: tuple[int, ...]) -> int: ...
def bnlstm_forward_workspace(problem: tuple[int, ...], tensors: tuple[float, ...]) -> int: ...
def bnlstm_forward(
    problem: tuple[int, ...], tensors: tuple[float, ...], workspace: int
) -> None: ...
def bnlstm_backward_workspace(problem: tuple[int, ...], tensors: tuple[float, ...]) -> int: ...
def bnlstm_backward(
    problem: tuple[int, ...], tensors: tuple[float, ...], workspace: int
) -> None: ...

version: str
