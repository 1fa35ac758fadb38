"""Builds the simulated NPU if need be; see test_npu_sim.sh."""

import sys

from npu_sim import build


def main() -> None:
    """Builds it, or ends with one sentence and exit code 1."""
    try:
        build.build()
    except build.BuildError as error:
        sys.exit(f"test_npu_sim: {error}")


if __name__ == "__main__":
    main()
