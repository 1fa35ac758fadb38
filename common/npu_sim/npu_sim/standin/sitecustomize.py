"""Makes torch look like its CPU build, which torch_npu needs, without importing it."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


class _CpuBuild:
    """Finds ``torch.version`` and takes its CUDA version away once it is loaded."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "torch.version":
            return None
        spec = PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def without_cuda(module: ModuleType) -> None:
            run(module)
            module.cuda = None  # type: ignore[attr-defined]

        spec.loader.exec_module = without_cuda  # type: ignore[method-assign]
        return spec


def _run_hidden() -> None:
    """Runs the sitecustomize that this one hides, such as a distribution's."""
    here = str(Path(__file__).parent)
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if path != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _CpuBuild)
# The stand-in needs npu_sim, which may not be installed in the interpreter that runs.
if (_package := str(Path(__file__).parents[2])) not in sys.path:
    sys.path.append(_package)
_run_hidden()
