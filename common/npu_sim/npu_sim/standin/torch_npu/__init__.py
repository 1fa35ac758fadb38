"""Stand-in for torch_npu 2.14.0 over a simulated NPU: the real one's names, nothing's speed.

``python -m npu_sim COMMAND`` puts it on the path.
"""

import os
import sys

import npu_sim as _npu_sim
from npu_sim import native as _native
from npu_sim import recorded as _recorded

_npu_sim.install()

import torch  # noqa: E402

npu = sys.modules["torch_npu.npu"] = sys.modules["torch.npu"]
sys.modules["torch_npu.npu.amp"] = npu.amp

# They need the device and torch_npu.npu.
from . import _extension, _operators, _patches, contrib, optim, profiler  # noqa: E402
from . import version as version  # noqa: E402
from ._casts import Format as Format  # noqa: E402
from ._casts import get_npu_format as get_npu_format  # noqa: E402
from .version import __version__ as __version__  # noqa: E402

_C = _extension.module()
ORG_AUTOLOAD = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
unsupported_dtype = [torch.quint8, torch.quint4x2, torch.quint2x4, torch.qint32, torch.qint8]
globals().update(_recorded.constants())

_operators.define()
_operators.export(sys.modules[__name__])
_recorded.complete(
    {
        "torch_npu": sys.modules[__name__],
        "torch_npu.contrib": contrib,
        "torch_npu.npu": npu,
        "torch_npu.npu.amp": npu.amp,
        "torch_npu.optim": optim,
        "torch_npu.profiler": profiler,
    }
)
_patches.apply()
if _version := os.environ.get("NPU_SIM_NATIVE"):
    _npu_sim.set_native_operators(_native.native_operators(_version))
del sys
