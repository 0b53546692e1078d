"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def maybe_checkpoint(
    function: Callable[..., torch.Tensor], *args: object, enabled: bool, **kwargs: object
) -> torch.Tensor:
    """Returns `function(*args, **kwargs)`, through a non-reentrant activation checkpoint if `enabled`.

    If enabled, only the arguments are saved and intermediates are recomputed in backward. Recomputation stops at the
    last tensor that backward needs, so a matrix product at the end is not repeated.
    """
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
    return function(*args, **kwargs)
