"""mmdet as the peer of a bench: what has to be done before it can be imported.

mmdet 3.3.0, mmengine and mmcv-lite 2.1.0 come from the environment; they are no requirement of
this zoo. mmcv-lite is without mmcv's compiled operators. ``use`` puts a module in their place, in
which deformable convolution is torchvision's and every other one says that it is not here.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
import warnings
from typing import Any

MISSING = (
    "mmdet is not here ({name}: {error}). This bench compares with it. Put it outside of this "
    "repository, and that on PYTHONPATH: pip install --no-deps --target DIRECTORY mmdet==3.3.0 "
    "mmengine==0.10.7 mmcv-lite==2.1.0 opencv-python-headless addict yapf platformdirs termcolor "
    "shapely scipy terminaltables matplotlib contourpy cycler fonttools kiwisolver pyparsing "
    "python-dateutil six"
)


class _Operators(types.ModuleType):
    """Stands in for ``mmcv._ext``: has every operator, and none of them works."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"mmcv-lite has no {name}")

        return missing


def use() -> None:
    """Makes mmdet ready to build models; calling it again does nothing.

    Raises:
        SystemExit: mmdet is not installed.
    """
    if "mmcv._ext" in sys.modules:
        return
    logging.disable(logging.INFO)  # mmengine's, a line for each parameter
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about their own imports
            import mmcv  # noqa: F401

            sys.modules["mmcv._ext"] = _Operators("mmcv._ext")
            convolution: Any = importlib.import_module("mmcv.ops.deform_conv")
            modulated: Any = importlib.import_module("mmcv.ops.modulated_deform_conv")
            from mmdet.utils import register_all_modules

            register_all_modules()
    except ImportError as error:
        sys.modules.pop("mmcv._ext", None)
        raise SystemExit(MISSING.format(name=error.name, error=error)) from error
    convolution.deform_conv2d = _deform_conv2d
    modulated.modulated_deform_conv2d = _modulated_deform_conv2d


def _deform_conv2d(
    x: Any, offset: Any, weight: Any, stride: Any, padding: Any, dilation: Any, *groups: Any
) -> Any:
    """As ``mmcv.ops.deform_conv2d``; torchvision reads the groups off the shapes."""
    from torchvision.ops import deform_conv2d

    del groups
    return deform_conv2d(x, offset, weight, None, stride, padding, dilation)


def _modulated_deform_conv2d(
    x: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    *groups: Any,
) -> Any:
    """As ``mmcv.ops.modulated_deform_conv2d``."""
    from torchvision.ops import deform_conv2d

    del groups
    return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)
