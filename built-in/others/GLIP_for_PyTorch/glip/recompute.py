"""Keeps less for the backward pass, on CPUs: parts of the network are computed again there.

Chen et al., Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174. The
numbers are the same, also of what is dropped at random. Accelerators keep everything: their time is
dearer, and a step must not ask for the state of their random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo_common.detection import ops


def recomputed(work: Callable[..., Any], tensor: Tensor, *others: Any) -> Any:
    """``work(tensor, *others)``, of which autograd keeps on a CPU only what is given."""
    if torch.is_grad_enabled() and ops.implementation_of(tensor.device) == "cpu":
        return checkpoint(work, tensor, *others, use_reentrant=False)
    return work(tensor, *others)
