"""Asks pip whether each pair of torch and torch_npu can be installed; see check_npu_pins.sh.

pip gets what a user gives it: the models' requirements, ``tools/pins/common.txt`` and the pins of
the pair, for a platform and Python by ``--platform`` and ``--python-version``. It reads metadata
and downloads no wheel. Where PyTorch's own index cannot be reached, an empty wheel stands for
torch's CPU build, with the demands of the same release in the package index less CUDA's libraries.
pip judges the conditions in the metadata of other packages by the Python that runs it; those in our
pins are judged here, for the Python in question.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from zoo_common.versions_npu import CPU_INDEX, PAIRS, Pair

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from model_dirs import find_models  # noqa: E402

RECORD = ROOT / "common" / "npu_sim" / "records" / "npu_pins.json"
ARCHITECTURES = ("x86_64", "aarch64")
GLIBC = ("2_28", "2_27", "2_26", "2_24", "2_18", "2_17", "2_12", "2_5")
NEEDED = ("torch", "torchvision", "torch-npu")
OURS = (*NEEDED, "zoo-common")
PIP_S = 600


class Pip:
    """A pip of its own, new enough to read metadata alone, that knows one index.

    Attributes:
        folder: scratch directory.
        version: pip's version.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the environment of pip."""
        self.folder = folder
        venv.create(folder / "venv", with_pip=True)
        self._python = str(folder / "venv" / "bin" / "python")
        self._environ = dict(os.environ)
        # A machine's own wheels must prove nothing; a mirror and its certificate are kept.
        for key in ("index-url", "cert"):
            found = self._call("config", "get", f"global.{key}")
            name = f"PIP_{key.replace('-', '_').upper()}"
            if found.returncode == 0 and name not in os.environ:
                self._environ[name] = found.stdout.strip()
        for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
            self._environ.pop(name, None)
        self._environ |= {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_CACHE_DIR": str(folder / "cache"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        self._call("install", "--quiet", "--upgrade", "pip>=24.1").check_returncode()
        self.version = self._call("--version").stdout.split()[1]

    def _call(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [self._python, "-m", "pip", *words]
        return subprocess.run(
            command, env=self._environ, capture_output=True, text=True, timeout=PIP_S
        )

    def resolve(self, arch: str, python: int, words: list[str]) -> dict[str, Any] | str:
        """What pip would install, by name, or the words of its refusal."""
        report = self.folder / "report.json"
        platforms = [f"--platform=manylinux_{glibc}_{arch}" for glibc in GLIBC]
        platforms += [f"--platform=manylinux{year}_{arch}" for year in ("2014", "2010", "1")]
        done = self._call(
            *("install", "--dry-run", "--ignore-installed", "--only-binary=:all:"),
            *(f"--target={self.folder / 'target'}", f"--report={report}"),
            *(f"--python-version=3.{python}", *platforms, *words),
        )
        if done.returncode:
            return _refusal(done.stdout + done.stderr)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
        return {item["metadata"]["name"].lower().replace("_", "-"): item for item in found}


def _refusal(text: str) -> str:
    """The part of pip's error that names versions, without pages of versions."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    signs = ("depends on", "requested (constraint)", "No matching")
    telling = [line for line in lines if any(sign in line for sign in signs)]
    return "; ".join((telling or lines[-1:] or ["no reason given"])[:4])[:400]


def requirements() -> list[str]:
    """What zoo-common, with its extras, and the models need beside torch."""
    wanted = set()
    for name in ("common", *(model.name for model in find_models())):
        for text in importlib.metadata.requires(f"zoo-{name}") or []:
            need = Requirement(text)
            if need.name not in OURS:
                wanted.add(f"{need.name}{need.specifier}")
    return sorted(wanted)


def pins_for(file: Path, arch: str, python: int) -> Iterator[str]:
    """The pins of a file that hold on a platform, without their conditions and options."""
    target = {
        "python_version": f"3.{python}",
        "python_full_version": f"3.{python}.0",
        "platform_machine": arch,
    }
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith(("#", "-")):
            continue
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate(target):
            yield f"{wanted.name}{wanted.specifier}"


def pins_file(pair: Pair) -> Path:
    """The file that pins a pair; the newest is the usual one."""
    name = "npu.txt" if pair is PAIRS[0] else f"npu-{pair.torch}.txt"
    return ROOT / "tools" / "pins" / name


def stand_in(folder: Path, version: str, needs: list[str]) -> None:
    """Writes an empty wheel with the name and the demands of torch's CPU build."""
    info = f"torch-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", "Name: torch", f"Version: {version}"]
    metadata += [f"Requires-Dist: {need}" for need in needs]
    tags = "Wheel-Version: 1.0\nGenerator: zoo\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")


def is_of_cuda(need: str, arch: str) -> bool:
    """Whether a demand of torch is for CUDA's libraries on that architecture."""
    wanted = Requirement(need)
    target = {"platform_machine": arch, "platform_system": "Linux", "extra": ""}
    names = ("nvidia-", "cuda-", "triton")
    return wanted.name.startswith(names) and (not wanted.marker or wanted.marker.evaluate(target))


def check(pip: Pip, pair: Pair, arch: str, python: int, reachable: bool) -> dict[str, Any]:
    """Proves one combination, or tells why not."""
    result: dict[str, Any] = {
        "torch": pair.torch,
        "torchvision": pair.torchvision,
        "torch_npu": pair.torch_npu,
        "arch": arch,
        "python": f"3.{python}",
    }
    alone = pip.resolve(arch, python, ["--no-deps", f"torch=={pair.torch}"])
    if isinstance(alone, str):
        return result | {"resolves": False, "said": alone}
    needs = alone["torch"]["metadata"].get("requires_dist", [])
    of_cuda = any(is_of_cuda(need, arch) for need in needs)
    result["torch_in_package_index"] = "CUDA build" if of_cuda else "CPU build"
    lines = [
        *pins_for(ROOT / "tools" / "pins" / "common.txt", arch, python),
        *pins_for(pins_file(pair), arch, python),
    ]
    if reachable:
        lines.append(f"--extra-index-url {CPU_INDEX}")
    else:
        plain = [need for need in needs if "platform_system" not in need and "extra" not in need]
        stand_in(pip.folder / "stand_ins", f"{pair.torch}+cpu", plain)
    constraints = pip.folder / "constraints.txt"
    constraints.write_text("\n".join(lines) + "\n", encoding="utf-8")
    links = [] if reachable else [f"--find-links={pip.folder / 'stand_ins'}"]
    words = [f"--constraint={constraints}", *links, *NEEDED, *requirements()]
    found = pip.resolve(arch, python, words)
    if isinstance(found, str):
        return result | {"resolves": False, "said": found}
    wheel = found["torch-npu"]["download_info"]["url"].rpartition("/")[2]
    return result | {"resolves": True, "torch_npu_wheel": wheel, "packages": len(found)}


def is_reachable() -> bool:
    """Whether PyTorch's own index answers."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=30):
            return True
    except (urllib.error.URLError, OSError):
        return False


def main() -> int:
    """Checks the pairs that are named, or all."""
    parser = argparse.ArgumentParser(description="Proves that the pins for NPUs can be installed.")
    known = [pair.torch for pair in PAIRS]
    parser.add_argument("torch", nargs="*", help=f"one of {', '.join(known)}; all by default")
    chosen = parser.parse_args().torch or known
    if unknown := sorted(set(chosen) - set(known)):
        print(f"No pins for torch {', '.join(unknown)}: name {', '.join(known)}.", file=sys.stderr)
        return 2
    reachable = is_reachable()
    where = "reachable" if reachable else "not reachable: a stand-in takes its CPU build's place"
    print(f"PyTorch's index is {where}.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = Pip(Path(folder))
        results = []
        for pair in (pair for pair in PAIRS if pair.torch in chosen):
            first, last = pair.pythons
            for arch in ARCHITECTURES:
                for python in range(first, last + 1):
                    results.append(check(pip, pair, arch, python, reachable))
                    print(_line(results[-1]), flush=True)
    failed = [result for result in results if not result["resolves"]]
    print(f"{len(results) - len(failed)} of {len(results)} combinations resolve.")
    proof = {
        "date": datetime.date.today().isoformat(),
        "pip": f"{pip.version} on Python {platform.python_version()}",
        "torch_cpu_build": "from PyTorch's index" if reachable else "stand-in, index not reachable",
    }
    write_record([result | proof for result in results])
    return 1 if failed else 0 if reachable else 3


def write_record(results: list[dict[str, Any]]) -> None:
    """Puts the results into the record, in place of older ones of the same versions of torch."""
    renewed = {result["torch"] for result in results}
    older = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else []
    known = [pair.torch for pair in PAIRS]
    kept = [one for one in older if one["torch"] in set(known) - renewed]
    combinations = sorted([*kept, *results], key=lambda one: known.index(one["torch"]))
    RECORD.parent.mkdir(exist_ok=True)
    rows = ",\n ".join(json.dumps(one) for one in combinations)
    RECORD.write_text(f"[{rows}]\n", encoding="utf-8")
    print(f"Written to {RECORD.name}.")


def _line(result: dict[str, Any]) -> str:
    what = "torch {torch}, torch_npu {torch_npu}, {arch}, Python {python}".format(**result)
    if not result["resolves"]:
        return f"REFUSED {what}: {result['said']}"
    return f"resolves {what} (the package index has torch's {result['torch_in_package_index']})"


if __name__ == "__main__":
    sys.exit(main())
