"""The module that is torch.npu, joined with the extension that it runs on."""

from types import ModuleType

from npu_sim.npu import _lazy


def device_module(extension: ModuleType) -> ModuleType:
    """The module for ``torch._register_device_module``."""
    from npu_sim import npu

    _lazy.extension = extension
    return npu
