"""Settings of all tests."""

import os

# Tests import torch before zoo_common does; see zoo_common/__init__.py for why this is off.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
