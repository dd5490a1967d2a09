"""Weights that torch's older utilities compute in a forward pre-hook."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["compute_hooked_weights"]

_COMPUTES = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


def compute_hooked_weights(module: nn.Module) -> None:
    """Do what `module(...)` does before forward for weight_norm, spectral_norm and pruning, for a
    method that is called directly. Hooks of the user are for whole calls: they are not run."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _COMPUTES):
            hook(module, ())
