"""DeCLIP's four losses, a module each, in float32 on purpose."""

from torch import Tensor, float64


def wide(tensor: Tensor) -> Tensor:
    """In the format of losses: float32, or float64 where the network computes in it."""
    return tensor if tensor.dtype is float64 else tensor.float()
