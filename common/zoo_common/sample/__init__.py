"""A synthetic data set, drawn in seconds: shapes on noisy backgrounds, in the cards' layouts.

``make()`` draws it into the cache, ``make_at()`` into a directory of your own, and
``python3 -m zoo_common.sample`` does either from the command line. Every picture is a function of
(``VERSION``, seed, split, index) and of its size alone. The files are the same bytes wherever
Pillow's JPEG library is the same; the pixels before JPEG compression are the same everywhere.
"""

from zoo_common.sample.dataset import LAYOUTS, make, make_at
from zoo_common.sample.directory import default_root
from zoo_common.sample.scenes import VERSION
from zoo_common.sample.shapes import CLASSES

__all__ = ["CLASSES", "LAYOUTS", "VERSION", "default_root", "make", "make_at"]
