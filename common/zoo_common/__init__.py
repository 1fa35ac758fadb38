"""What the models of this zoo share: launching, devices, precision, records, data sets.

Imports flow one way: a model imports ``zoo_common``, ``zoo_common`` never imports a model.
"""

import os

# torch_npu installed beside a missing CANN breaks `import torch` for good in that process.
# zoo_common.device imports torch_npu itself, with an error that says what to do, so this holds
# whatever the user's shell says.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

__version__ = "0.1.0"
