"""Tells whether tensors are what they were when something was made of them and kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Version(NamedTuple):
    """What a tensor held at a time: equal to another of it as long as nothing was written.

    Attributes:
        memory: while it lives, other memory is not taken for this one, even at its address.
        address: of the tensor in it.
        changes: autograd's count of what was written in place.
    """

    memory: StorageWeakRef
    address: int
    changes: int


Versions = tuple[int, tuple[Version, ...]]


def versions(*tensors: Tensor) -> Versions:
    """The versions of some tensors, and the number of threads, on which oneDNN's orders depend.

    A change past autograd's counting, as ``tensor.data.mul_()``, is not seen, and what was made in
    inference mode counts nothing and cannot be asked.
    """
    return torch.get_num_threads(), tuple(
        Version(
            StorageWeakRef(one.untyped_storage()),  # type: ignore[no-untyped-call]
            one.data_ptr(),
            one._version,
        )
        for one in tensors
    )
