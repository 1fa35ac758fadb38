"""Makes the environment with the real torch_npu and runs its tests; see test_torch_npu.sh."""

import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from environment import Environment, SetupError  # noqa: E402
from model_dirs import choose_model  # noqa: E402

TESTS = ROOT / "common/npu_sim/cann/tests"
RECORDS = ROOT / "common/npu_sim/records"
PINS = ROOT / "tools/pins/npu.txt"
REACH_S = 10


class TorchNpuEnvironment(Environment):
    """The environment of a machine with Ascend cards, beside the checkout's own."""

    def __init__(self, root: Path, cpu_build: bool) -> None:
        """Describes the environment; makes nothing.

        Args:
            root: the repository.
            cpu_build: whether PyTorch's own index is there, which alone has torch's CPU build.
        """
        super().__init__(root, with_ci=True)
        self.venv = root / ".venv-torch-npu"
        self.python = self.venv / "bin" / "python"
        self._stamp = self.venv / "zoo-stamp.json"
        self._cut_short = self.venv / "zoo-installing"
        self._log = self.venv / "zoo-pip.log"
        self._cpu_build = cpu_build

    def _pins(self) -> list[Path]:
        common, npu = super()._pins()
        if self._cpu_build:
            return [common, npu]
        build = self.root / "build"
        build.mkdir(exist_ok=True)
        public = build / "npu_pins_without_pytorch_index.txt"
        public.write_text(public_pins(npu.read_text(encoding="utf-8")), encoding="utf-8")
        return [common, public]


def public_pins(text: str) -> str:
    """The pins as the public package index has them: no index of PyTorch's, no ``+cpu``."""
    lines = [line for line in text.splitlines() if not line.startswith("--extra-index-url")]
    return re.sub(r"\+cpu$", "", "\n".join(lines) + "\n", flags=re.MULTILINE)


def has_pytorch_index() -> bool:
    """Whether the index that the pins name can be reached."""
    index = re.search(r"^--extra-index-url (\S+)", PINS.read_text(encoding="utf-8"), re.MULTILINE)
    assert index, f"{PINS} names no index"
    try:
        with urllib.request.urlopen(f"{index[1]}/torch/", timeout=REACH_S):
            return True
    except (urllib.error.URLError, OSError):
        return False


def make_environment() -> TorchNpuEnvironment:
    """The environment, ready; says which torch it has.

    Raises:
        SetupError: no network, no wheel for this Python, or no space.
    """
    os.environ["ZOO_PLATFORM"] = "npu"
    os.environ.pop("ZOO_TORCH", None)
    cpu_build = has_pytorch_index()
    environment = TorchNpuEnvironment(ROOT, cpu_build)
    environment.ensure()
    build = (
        "torch's CPU build, from PyTorch's index"
        if cpu_build
        else "torch's CUDA build, made to look like the CPU one: PyTorch's index is out of reach"
    )
    print(f"torch_npu {_version(environment, 'torch-npu')} beside {build}.", flush=True)
    return environment


def _version(environment: Environment, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    command = [str(environment.python), "-Ic", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(words: list[str]) -> int:
    """Runs the tests for the named models, or for all; their exit code."""
    for_pytest = [word for word in words if word.startswith("-")]
    if for_pytest:  # an option may have a value, so all after the first goes along
        first = words.index(for_pytest[0])
        words, for_pytest = words[:first], words[first:]
    try:
        models = [choose_model(word).name for word in words]
        environment = make_environment()
    except (LookupError, SetupError) as error:
        print(error, file=sys.stderr)
        return 2
    command = [str(environment.python), "-m", "pytest", str(TESTS), *for_pytest]
    command += ["-o", "tmp_path_retention_policy=failed"]  # checkpoints of all runs: a GB
    command += [f"--npu-model={name}" for name in models]
    if not words and not for_pytest:
        version = _version(environment, "torch-npu")
        command.append(f"--npu-record={RECORDS / f'torch_npu_{version}.json'}")
    return subprocess.call(command, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
