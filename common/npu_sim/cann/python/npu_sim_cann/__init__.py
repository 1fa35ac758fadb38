"""Compute kernels for the real torch_npu on the stand-in CANN; sitecustomize.py installs them."""

from typing import Any

_kernels = 0


def install() -> None:
    """Puts CPU kernels in the place of those that torch_npu starts CANN's operators with."""
    global _kernels
    from npu_sim_cann import replacements
    from npu_sim_cann.kernels import install as install_kernels

    _kernels = install_kernels()
    replacements.install()


def replaced() -> dict[str, Any]:
    """What in this process is a stand-in, for the record of a test run."""
    from npu_sim_cann import replacements

    return {
        "libraries of CANN and the driver": "host memory, no queue; collectives in shared memory",
        "kernels of PyTorch's operators": _kernels,
        "operators of torch_npu": {one.operator: one.reason for one in replacements.REPLACED},
    }
