"""The part that imports torch and torch_npu, in a process that may die of it.

``python3 -m zoo_common.doctor.child`` prints a JSON object a line as soon as it knows something,
so that what it learned before an abort is not lost.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from zoo_common.errors import first_line


def tell(**facts: Any) -> None:
    """Hands facts to the parent."""
    print(json.dumps(facts), flush=True)


def main() -> None:
    """Looks at torch, then torchvision, then CUDA, then NPUs: the riskiest last."""
    tell(library_path=os.environ.get("LD_LIBRARY_PATH", ""))
    import torch

    tell(
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        threads=torch.get_num_threads(),
    )
    tell(torchvision_problem=_torchvision_problem())
    from zoo_common import device

    for kind in ("cuda", "npu"):
        tell(trying=kind)
        reason = device.reason_against(kind)
        tell(**{f"{kind}_reason": reason, f"{kind}_count": 0 if reason else device.count(kind)})
        if kind == "npu":
            tell(npu_imported="torch_npu" in sys.modules)
        if reason is None:
            tell(**{f"{kind}_name": device.describe(torch.device(kind, 0))})


def _torchvision_problem() -> str | None:
    """What goes wrong when torchvision is imported and its compiled operators are looked up."""
    try:
        import torch

        importlib.import_module("torchvision")
        torch.ops.torchvision.nms  # noqa: B018  raises where the operator is not registered
    except Exception as error:
        return first_line(error)
    return None


if __name__ == "__main__":
    main()
