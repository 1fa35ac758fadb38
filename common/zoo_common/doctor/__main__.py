"""``python3 -m zoo_common.doctor``."""

import sys

from zoo_common.doctor import main

if __name__ == "__main__":
    sys.exit(main())
