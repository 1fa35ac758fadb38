"""Which torch_npu belongs to which torch, Python, CANN and driver, as published: data.

Sources:

* torch_npu, its torch, branch and CANN: COMPATIBILITY.md of Ascend/pytorch and, for post releases
  that it does not list, the ``version.txt`` of their branches; read in August 2026. Later releases
  stand here as the package index has them, with no CANN.
* which CANN a series of torch_npu works with: release notes of Ascend Extension for PyTorch 7.2.0
  (up to branch 7.2) and of TorchNPU 26.1.0 (from branch 7.3 on).
* which driver a series of CANN works with: release notes of CANN 9.1.0.

The module imports the standard library alone, so that ``zoo_common.doctor`` can run anywhere.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PYTHONS = ((3, 10), (3, 14))
"""First and last version of Python that the zoo runs with."""

OLDEST_TORCH = (2, 6)
"""First version of torch that the zoo runs with."""

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where torch's CPU builds are; what the package index has for Linux is a CUDA build on x86-64,
and from torch 2.11 on for aarch64 as well."""


class Release(NamedTuple):
    """A release of torch_npu.

    Attributes:
        torch_npu: its version, as pip knows it.
        torch: the version of torch that it is made for.
        branch: its branch in Ascend/pytorch, ``v<torch>-<product version>``; None is not known.
        cann: the CANN that it is published with; None is not documented.
    """

    torch_npu: str
    torch: str
    branch: str | None
    cann: str | None


class Pair(NamedTuple):
    """What to install together; ``tools/pins/npu*.txt`` pin it.

    Attributes:
        torch: its CPU build.
        torchvision: the version made for that torch.
        torch_npu: the newest release for that torch.
        pythons: first and last minor version of Python 3 with wheels of all three.
    """

    torch: str
    torchvision: str
    torch_npu: str
    pythons: tuple[int, int]


PAIRS = (
    Pair("2.14.0", "0.29.0", "2.14.0", (10, 14)),
    Pair("2.13.0", "0.28.0", "2.13.0", (10, 14)),
    Pair("2.12.0", "0.27.0", "2.12.0.post3", (10, 14)),
    Pair("2.11.0", "0.26.0", "2.11.0.post3", (10, 14)),
    Pair("2.10.0", "0.25.0", "2.10.0.post7", (10, 14)),
    Pair("2.9.0", "0.24.0", "2.9.0.post9", (10, 13)),
    Pair("2.8.0", "0.23.0", "2.8.0.post5", (10, 13)),
    Pair("2.7.1", "0.22.1", "2.7.1.post11", (10, 13)),
    Pair("2.6.0", "0.21.0", "2.6.0.post5", (10, 11)),
)

_PUBLISHED = """
2.14.0        -               -
2.13.0        -               -
2.12.0.post3  v2.12.0-26.1.0  -
2.12.0.post2  v2.12.0-26.1.0  9.1
2.12.0        v2.12.0-26.1.0  9.1.0
2.11.0.post3  v2.11.0-26.1.0  -
2.11.0.post2  v2.11.0-26.1.0  9.1
2.11.0        v2.11.0-26.1.0  9.1.0
2.10.0.post7  v2.10.0-26.1.0  -
2.10.0.post6  v2.10.0-26.1.0  9.1
2.10.0.post4  v2.10.0-26.1.0  9.1.0
2.10.0.post2  v2.10.0-26.0.0  -
2.10.0        v2.10.0-26.0.0  9.0.0
2.9.1         -               -
2.9.0.post9   v2.9.0-26.1.0   -
2.9.0.post8   v2.9.0-26.1.0   9.1
2.9.0.post6   v2.9.0-26.1.0   9.1.0
2.9.0.post4   v2.9.0-26.0.0   -
2.9.0.post2   v2.9.0-26.0.0   9.0.0
2.9.0         v2.9.0-7.3.0    8.5.0
2.8.0.post5   v2.8.0-26.0.0   -
2.8.0.post4   v2.8.0-26.0.0   9.0.0
2.8.0.post2   v2.8.0-7.3.0    8.5.0
2.8.0         v2.8.0-7.2.0    8.3.RC1
2.7.1.post11  v2.7.1-26.1.0   -
2.7.1.post10  v2.7.1-26.1.0   9.1
2.7.1.post8   v2.7.1-26.1.0   9.1.0
2.7.1.post6   v2.7.1-26.0.0   -
2.7.1.post4   v2.7.1-26.0.0   9.0.0
2.7.1.post2   v2.7.1-7.3.0    8.5.0
2.7.1         v2.7.1-7.2.0    8.3.RC1
2.6.0.post5   v2.6.0-7.3.0    8.5.0
2.6.0.post3   v2.6.0-7.2.0    8.3.RC1
2.6.0         v2.6.0-7.1.0    8.2.RC1
2.5.1.post1   v2.5.1-7.1.0    8.2.RC1
2.5.1         v2.5.1-7.0.0    8.1.RC1
2.4.0.post4   v2.4.0-7.0.0    8.1.RC1
2.4.0.post2   v2.4.0-6.0.0    8.0.0
2.4.0         v2.4.0-6.0.rc3  8.0.RC3
2.3.1.post6   v2.3.1-7.0.0    8.1.RC1
2.3.1.post4   v2.3.1-6.0.0    8.0.0
2.3.1.post2   v2.3.1-6.0.rc3  8.0.RC3
2.1.0.post17  v2.1.0-7.2.0    8.3.RC1
2.1.0.post13  v2.1.0-7.1.0    8.2.RC1
2.1.0.post12  v2.1.0-7.0.0    8.1.RC1
2.1.0.post10  v2.1.0-6.0.0    8.0.0
2.1.0.post8   v2.1.0-6.0.rc3  8.0.RC3
"""


def _releases() -> tuple[Release, ...]:
    rows = (line.split() for line in _PUBLISHED.strip().splitlines())
    return tuple(
        Release(
            version,
            version.partition(".post")[0],
            None if branch == "-" else branch,
            None if cann == "-" else cann,
        )
        for version, branch, cann in rows
    )


RELEASES = _releases()
"""The releases of torch_npu in the package index, newest first."""

_CANN_UP_TO_7_2 = ("8.0.RC2", "8.3")
_CANN_FROM_7_3 = ("8.5", "9.1")

OLDEST_DRIVER = {"8.5": "25.0", "9.0": "25.0", "9.1": "25.2"}
"""The first driver (Ascend HDK) that a series of CANN is documented to work with."""


class Verdict(NamedTuple):
    """Whether two versions fit: ``ok``, ``problem`` or ``note``, in words, and what to do."""

    status: str
    text: str
    advice: str = ""


def order(version: str) -> tuple[int, int, int, int] | None:
    """A key to compare versions of CANN, its driver or torch by, or None for what is no version.

    A release candidate (``8.3.RC1``) and a beta (``9.1.0-beta.3``) go before the release.
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.(?:(\d+)|(?:RC|rc)(\d+)))?(-|\.?alpha|\.?beta)?", version)
    if match is None:
        return None
    major, minor, patch, candidate, early = match.groups()
    if candidate:
        return int(major), int(minor), -1, int(candidate)
    return int(major), int(minor), int(patch or 0) - bool(early), 0


def series(version: str) -> str:
    """``2.14`` of ``2.14.1+cpu``."""
    return ".".join(version.split(".")[:2])


def public(version: str) -> str:
    """A version without what a build adds: ``2.14.0`` of ``2.14.0+cpu``."""
    return version.partition("+")[0]


def find(torch_npu: str) -> Release | None:
    """The published release of that version, or None."""
    return next((one for one in RELEASES if one.torch_npu == public(torch_npu)), None)


def pair_for(torch: str) -> Pair | None:
    """What to install with a version of torch, by its series, or None."""
    return next((pair for pair in PAIRS if series(pair.torch) == series(torch)), None)


def install_command(pair: Pair = PAIRS[0]) -> str:
    """The pip command that installs a pair; the CPU build of torch is on an index of its own."""
    return (
        f"pip install torch=={pair.torch}+cpu torchvision=={pair.torchvision} "
        f"torch-npu=={pair.torch_npu} --extra-index-url {CPU_INDEX}"
    )


def torchvision_for(torch: str) -> str:
    """The series of torchvision made for a version of torch 2."""
    return f"0.{int(series(torch).split('.')[1]) + 15}"


def judge_torch(torch_npu: str, torch: str) -> Verdict:
    """Whether a torch_npu is made for a torch."""
    made_for = public(torch_npu).partition(".post")[0]
    if made_for == public(torch):
        return Verdict("ok", f"made for torch {made_for}")
    pair = pair_for(torch)
    advice = f"install the two that belong together: {install_command(pair or PAIRS[0])}"
    if series(made_for) != series(torch):
        return Verdict("problem", f"made for torch {made_for}, and this is torch {torch}", advice)
    return Verdict(
        "note", f"made for torch {made_for}; beside torch {torch} it is untested", advice
    )


def cann_for(torch_npu: str) -> str | None:
    """The CANN that a torch_npu, or the newest release before it, is published with."""
    version = public(torch_npu)
    listed = [one.torch_npu for one in RELEASES]
    later = RELEASES[listed.index(version) :] if version in listed else RELEASES
    return next((one.cann for one in later if one.cann), None)


def cann_range(torch_npu: str) -> tuple[str, str]:
    """First and last series of CANN that the release's series is documented to work with."""
    release = find(torch_npu)
    if release is None or release.branch is None:
        return _CANN_FROM_7_3
    product = order(release.branch.partition("-")[2])
    return _CANN_UP_TO_7_2 if product and product < (7, 3, 0, 0) else _CANN_FROM_7_3


def judge_cann(torch_npu: str, cann: str) -> Verdict:
    """Whether an installed CANN is one that a torch_npu works with."""
    version = order(cann)
    wanted = cann_for(torch_npu)
    if version is None or wanted is None:
        return Verdict("note", f"whether CANN {cann} fits torch_npu {torch_npu} is not known here")
    first, last = cann_range(torch_npu)
    advice = f"install CANN {wanted}, or a torch_npu that is made for CANN {cann}"
    if version < (order(first) or version):
        return Verdict(
            "problem", f"CANN {cann} is too old for torch_npu {torch_npu} (from {first} on)", advice
        )
    release = find(torch_npu)
    if release is None or release.branch is None:
        return Verdict(
            "note",
            f"no CANN is documented for torch_npu {torch_npu}; the newest documented, "
            f"{_newest_documented()}, is published with CANN {wanted}",
        )
    if version[:2] > (order(last) or version)[:2]:
        return Verdict(
            "note", f"CANN {cann} is newer than those documented for it ({first} to {last})"
        )
    return Verdict("ok", f"fits torch_npu {torch_npu} (documented for CANN {first} to {last})")


def _newest_documented() -> str:
    return next(one.torch_npu for one in RELEASES if one.cann)


def judge_driver(driver: str, cann: str) -> Verdict:
    """Whether an installed driver (Ascend HDK) is one that a CANN works with."""
    oldest = OLDEST_DRIVER.get(series(cann))
    here = order(driver)
    if oldest is None or here is None:
        return Verdict("ok", f"whether it fits CANN {cann} is not documented here")
    if here[:2] < (order(oldest) or here)[:2]:
        return Verdict(
            "problem",
            f"too old for CANN {cann}, which needs {oldest} or newer",
            "install a newer driver and firmware (Ascend HDK), as root",
        )
    return Verdict("ok", f"fits CANN {cann} (from {oldest} on)")
