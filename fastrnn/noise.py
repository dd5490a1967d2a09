"""What regularisers ask of the kernels of one layer, as data that an operator can carry."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastrnn.kinds import KINDS

__all__ = ["MODES", "Noise", "seed_on", "tape_slots"]

MODES = ("update", "cell", "state")


class Noise(NamedTuple):
    """What a layer's kernels need to know; probabilities of 0 are off.

    Attributes:
        layer: its number in the stack, which tells its masks from those of others.
        training: masks are drawn; False: expectations take their place.
        mode: of recurrent dropout, "" if there is none.
        sequence: one recurrent-dropout mask serves all steps.
        drop, zoneout_h, zoneout_c: probabilities.
    """

    layer: int = 0
    training: bool = False
    mode: str = ""
    sequence: bool = False
    drop: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0

    @property
    def drops(self) -> bool:
        """Whether recurrent dropout changes anything."""
        # An inverted mask's expectation is the identity.
        return bool(self.mode) and (self.training or self.mode != "state")

    @property
    def acts(self) -> bool:
        """Whether there is anything for a kernel to do."""
        return self.drops or bool(self.zoneout_h or self.zoneout_c)

    @property
    def mixes(self) -> bool:
        """Whether zoneout mixes new and old values, as its expectation does."""
        return not self.training and bool(self.zoneout_h or self.zoneout_c)

    def text(self) -> str:
        """As the operators take it; ``parse`` is the way back."""
        when = "training" if self.training else "eval"
        words = [f"layer={self.layer}", when]
        if self.mode:
            per = "sequence" if self.sequence else "step"
            words += [f"{self.mode}={self.drop!r}", f"per={per}"]
        for name in ("zoneout_h", "zoneout_c"):
            p = getattr(self, name)
            words += [f"{name}={p!r}"] if p else []
        return ",".join(words)

    @staticmethod
    def parse(text: str) -> Noise:
        """``text`` read back, less what has no effect; "" is no noise."""
        noise = _parsed.get(text)
        if noise is None:
            if len(_parsed) > 1000:
                _parsed.clear()
            noise = _parsed[text] = _parse(text)
        return noise


_parsed: dict[str, Noise] = {}


def _parse(text: str) -> Noise:
    fields: dict[str, Any] = {}
    for word in text.split(",") if text else ():
        name, _, value = word.partition("=")
        if name in ("training", "eval"):
            fields["training"] = name == "training"
        elif name == "layer":
            fields["layer"] = int(value)
        elif name in MODES:
            fields["mode"], fields["drop"] = name, float(value)
        elif name == "per":
            fields["sequence"] = value == "sequence"
        elif name in ("zoneout_h", "zoneout_c"):
            fields[name] = float(value)
        else:
            raise ValueError(
                f"noise: got {word!r}, expected words of layer=, training, eval, update=, cell=, "
                "state=, per=, zoneout_h=, zoneout_c="
            )
    noise = Noise(**fields)
    return noise if noise.drops else noise._replace(mode="", sequence=False, drop=0.0)


def tape_slots(cell: str, noise: str, plan: str = "") -> int:
    """Values per unit on the tape.

    An Elman layer's derivative needs the value that zoneout mixed with the old one; in training the
    mask leaves either of the two. The CUDA kernels with regularisers keep it in any case.
    """
    drawn = Noise.parse(noise)
    mixes = drawn.acts if plan.startswith("cuda") else drawn.mixes
    return 1 if cell.startswith("rnn") and mixes else KINDS[cell].tape


def seed_on(seed: Tensor, device: torch.device) -> Tensor:
    """A seed for kernels of a GPU. A fill has its number from the launch, so it does not wait and
    can be captured, as a copy from the host could not."""
    if type(seed) is Tensor and seed.is_cpu and device.type == "cuda" and not is_compiling():
        return torch.full((1,), int(seed), dtype=torch.int64, device=device)
    return seed if device.type == "cpu" else seed.to(device)
