"""Says whether this machine can run the zoo, and what to do if not; works from any directory.

    python tools/doctor.py [--device npu] [--data_path DIR] [--json]

It takes the active Python when the zoo is installed there, else the repository's ``.venv``; where
neither is, it looks at what can be seen without an environment, and says how to make one.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs ``zoo_common.doctor`` with the Python that would run the zoo."""
    if sys.version_info < (3, 10):  # noqa: UP036  before the environment, any Python may come
        print("Python 3.10 to 3.14 is needed: run this with one of them.", file=sys.stderr)
        return 1
    words = ["-m", "zoo_common.doctor", *sys.argv[1:]]
    own = ROOT / ".venv" / "bin" / "python"
    for python in (sys.executable, str(own)):
        if _has_zoo(python):
            return subprocess.call([python, *words])
    path = [str(ROOT / "common"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.call([sys.executable, *words], env=environ)


def _has_zoo(python: str) -> bool:
    code = "import importlib.metadata as m; m.version('zoo-common')"
    try:
        return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
