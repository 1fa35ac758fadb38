"""Readies each Python process of a run for torch_npu on the stand-in CANN.

set_env.sh puts this directory on PYTHONPATH, as a real CANN does with its own Python packages, so
no code of the zoo knows of it. Nothing is imported here that the process does not import itself.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def _without_cuda(version: ModuleType) -> None:
    """Where torch is a CUDA build, it shall look like the CPU build that torch_npu asks for."""
    version.cuda = None  # type: ignore[attr-defined]


def _forget_allocator_options(torch_npu: ModuleType) -> None:
    from npu_sim_cann import allocator

    allocator.forget_options()


def _install_kernels(torch_npu: ModuleType) -> None:
    import npu_sim_cann

    npu_sim_cann.install()


_BEFORE: dict[str, Callable[[ModuleType], None]] = {"torch_npu": _forget_allocator_options}
_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "torch.version": _without_cuda,
    "torch_npu": _install_kernels,
}


class _Hook:
    """Finds the modules of the tables as usual, and does something around their execution."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in _AFTER:
            return None
        spec = PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_between(module: ModuleType) -> None:
            if name in _BEFORE:
                _BEFORE[name](module)
            execute(module)
            _AFTER[name](module)

        spec.loader.exec_module = execute_between  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Hook)
