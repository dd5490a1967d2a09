"""Types of the native CUDA module, csrc/bindings/cuda*.cc: sizes, addresses, streams."""

version: str
emulated: bool
flag_bytes: int
row_statistics: int

def device(ordinal: int) -> tuple[int, ...]: ...
def plans(
    device: tuple[int, ...], problem: tuple[int, ...]
) -> list[tuple[str, str, str, tuple[int, ...], int, int, int, int, float]]: ...
def resident_ctas(
    ordinal: int, kernel: tuple[int, ...], ctas_of_a_cluster: int, depth: int
) -> int: ...
def packed_bytes(kernel: tuple[int, ...], ctas: int) -> int: ...
def pack(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    weights: int,
    packed: int,
    H: int,
    ctas: int,
    projection: int,
    P: int,
) -> None: ...
def prepare_mail(ordinal: int, stream: int, mail: int, bytes: int) -> None: ...
def clear(ordinal: int, stream: int, words: int, bytes: int) -> None: ...
def forward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    directions: tuple[int, ...],
) -> None: ...
def backward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    directions: tuple[int, ...],
) -> None: ...
def regularised_forward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    directions: tuple[int, ...],
    noise: tuple[float, ...],
    masked: tuple[int, ...],
) -> None: ...
def regularised_backward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    directions: tuple[int, ...],
    noise: tuple[float, ...],
) -> None: ...
def mask_states(
    ordinal: int,
    stream: int,
    number_format: int,
    noise: tuple[float, ...],
    states: tuple[int, ...],
) -> None: ...
def rhn_forward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    directions: tuple[int, ...],
    depth: int,
) -> None: ...
def rhn_backward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    directions: tuple[int, ...],
    depth: int,
) -> None: ...
def bnlstm_forward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    directions: tuple[int, ...],
    options: tuple[float, ...],
) -> None: ...
def bnlstm_backward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    directions: tuple[int, ...],
    options: tuple[float, ...],
) -> None: ...
def projected_forward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    directions: tuple[int, ...],
    P: int,
) -> None: ...
def projected_backward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    directions: tuple[int, ...],
    P: int,
) -> None: ...
def pair_line(units: int) -> int: ...
def layer_norm_forward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    directions: tuple[int, ...],
    eps: float,
) -> None: ...
def layer_norm_backward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    directions: tuple[int, ...],
) -> None: ...
def steps_workspace_bytes(kernel: tuple[int, ...], shape: tuple[int, ...]) -> int: ...
def steps_forward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    directions: tuple[int, ...],
    noise: tuple[float, ...],
    workspace: int,
) -> None: ...
def steps_rhn_forward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    directions: tuple[int, ...],
    workspace: int,
) -> None: ...
def steps_rhn_backward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    directions: tuple[int, ...],
    workspace: int,
) -> None: ...
def steps_backward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    directions: tuple[int, ...],
    noise: tuple[float, ...],
    workspace: int,
) -> None: ...
def steps_bnlstm_forward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    directions: tuple[int, ...],
    options: tuple[float, ...],
    workspace: int,
) -> None: ...
def steps_bnlstm_backward(
    ordinal: int,
    stream: int,
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    directions: tuple[int, ...],
    options: tuple[float, ...],
    workspace: int,
) -> None: ...
