"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., torch.Tensor], *arguments: object, when: bool) -> torch.Tensor:
    """`function(*arguments)`; with `when` it keeps its arguments alone, and what it keeps else is made anew.

    It stops where the last tensor that is needed has been made: a matrix product at the end is not done again.
    """
    if when and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)
