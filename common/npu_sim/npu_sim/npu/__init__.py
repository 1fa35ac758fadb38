"""What ``torch.npu`` is on the simulator: torch_npu's names over ``torch.accelerator``.

The names, and those that are there but not simulated, are the recorded ones of torch_npu 2.14.0;
``tests/test_standin_conformance.py`` holds them against the record.
"""

from npu_sim import recorded as _recorded
from npu_sim.npu import (
    _autocast,
    _config,
    _device,
    _errors,
    _lazy,
    _memory,
    _random,
    _streams,
    _types,
)
from npu_sim.npu import amp as amp

_is_in_bad_fork = _lazy.is_in_bad_fork
_lazy_call = _lazy.lazy_call
_lazy_init = _lazy.lazy_init


def __getattr__(name: str) -> object:
    # Empty before the NPU has started, as on the real one, so it cannot be a plain value.
    if name == "default_generators":
        return _lazy.generators()
    raise AttributeError(f"module 'torch_npu.npu' has no attribute {name!r}")


# A part offers what torch.npu has under the same name.
for _part in (_autocast, _config, _device, _errors, _lazy, _memory, _random, _streams):
    for _name, _value in vars(_part).items():
        if f"torch_npu.npu.{_name}" in _recorded.api():
            globals()[_name] = _value
globals().update(_types.tensor_types())
globals().update(_types.storage_types())
__all__ = [_name for _name in globals() if not _name.startswith("_")]
