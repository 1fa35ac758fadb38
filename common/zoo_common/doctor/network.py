"""Ports, and the network interfaces that HCCL and gloo are told to use."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from zoo_common.doctor.lines import NOTE, OK, PROBLEM, Line
from zoo_common.doctor.machine import Machine

TORCHRUN_PORT = 29500
_HCCL_PORT = 60000
_HCCL_PORTS = 32  # what CANN 8.2 and newer take; older releases take the first 16 of them
_SHOWN = 4


def ports(machine: Machine) -> list[Line]:
    """The ports of torchrun and of HCCL on this host."""
    lines = []
    if is_free(TORCHRUN_PORT):
        lines.append(Line("port", OK, f"{TORCHRUN_PORT} (torchrun's usual one) is free"))
    else:
        text = f"{TORCHRUN_PORT} (torchrun's usual one) is in use, perhaps by another run"
        advice = "a run on one machine takes a free one; on several give another --master_port"
        lines.append(Line("port", NOTE, text, advice))
    if machine.kind == "npu":
        lines += _hccl_ports(machine)
    return lines


def is_free(port: int) -> bool:
    """Whether a server could listen at a port of this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _hccl_ports(machine: Machine) -> list[Line]:
    """HCCL's ports on the host; those on the cards themselves (16666) cannot be seen from here."""
    environ = machine.environ
    lines = []
    for side in ("HOST", "NPU"):
        name = f"HCCL_{side}_SOCKET_PORT_RANGE"
        value = environ.get(name)
        if value is not None and value != "auto" and parse_ports(value) is None:
            text = f"{name}='{value}' is no list of ports from 1 to 65535 that do not overlap"
            advice = "write it as 60000-60050 or 60000,60010-60020 or auto"
            lines.append(Line("HCCL ports", machine.npu_trouble, text, advice))
    if lines:
        return lines
    wanted = environ.get("HCCL_HOST_SOCKET_PORT_RANGE")
    if wanted == "auto":
        return [Line("HCCL ports", OK, "HCCL_HOST_SOCKET_PORT_RANGE=auto: any free ones")]
    taken_by = "HCCL_HOST_SOCKET_PORT_RANGE"
    numbers = parse_ports(wanted) if wanted else None
    if numbers is None:
        taken_by = "HCCL_IF_BASE_PORT"
        base = environ.get(taken_by, str(_HCCL_PORT))
        if not base.isdigit() or not 1024 <= int(base) <= 65520:
            text = f"HCCL_IF_BASE_PORT='{base}' is no number from 1024 to 65520"
            return [Line("HCCL ports", machine.npu_trouble, text, "set it to 60000 or unset it")]
        numbers = [n for n in range(int(base), int(base) + _HCCL_PORTS) if n <= 65535]
    shown = f"{numbers[0]} to {numbers[-1]}"
    taken = [number for number in numbers if not is_free(number)]
    if taken:
        some = ", ".join(map(str, taken[:_SHOWN])) + (" ..." if len(taken) > _SHOWN else "")
        text = f"{shown}: {some} in use, perhaps by another run"
        advice = f"choose others by {taken_by}"
        return [Line("HCCL ports", machine.npu_trouble, text, advice)]
    return [Line("HCCL ports", OK, f"{shown} are free"), *_reserved(machine, numbers)]


def _reserved(machine: Machine, numbers: list[int]) -> list[Line]:
    """Whether the system may give HCCL's ports to others at any time."""
    settings = machine.system / "proc/sys/net/ipv4"
    try:
        first, last = map(int, (settings / "ip_local_port_range").read_text().split())
        kept = parse_ports((settings / "ip_local_reserved_ports").read_text().strip()) or []
    except (OSError, ValueError):
        return []
    loose = [number for number in numbers if first <= number <= last and number not in kept]
    if not loose:
        return []
    reserve = f"sysctl -w net.ipv4.ip_local_reserved_ports={numbers[0]}-{numbers[-1]}"
    text = f"the system gives out ports {first} to {last}, HCCL's among them"
    return [Line("HCCL ports", NOTE, text, f"as root: {reserve}")]


def parse_ports(text: str) -> list[int] | None:
    """Reads ``60000,60050-60100``; None for what is no such list."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= 65535:
            return None
        numbers += range(first, last + 1)
    return numbers if len(numbers) == len(set(numbers)) else None


def interfaces(machine: Machine) -> list[Line]:
    """Variables that name an interface, an address or a rank table."""
    environ = machine.environ
    names = [name for _, name in socket.if_nameindex()]
    lines = []
    address = environ.get("HCCL_IF_IP")
    if address is not None and not _is_mine(address):
        text = f"HCCL_IF_IP={address} is no address of this machine"
        advice = "set it to this machine's own address (ip addr), or unset it"
        lines.append(Line("network", machine.npu_trouble, text, advice))
    for name, matches in (
        ("HCCL_SOCKET_IFNAME", matches_hccl),
        ("GLOO_SOCKET_IFNAME", lambda wanted, names: wanted.split(",")[0] in names),
    ):
        wanted = environ.get(name)
        if wanted is not None and not matches(wanted, names):
            status = machine.npu_trouble if name.startswith("HCCL") else PROBLEM
            text = f"{name}={wanted} matches no interface ({', '.join(names)})"
            lines.append(Line("network", status, text, "name one of them, or unset it"))
    table = environ.get("RANK_TABLE_FILE")
    if table is not None:
        there = Path(table).is_file()
        text = "is set: HCCL takes the ranks from it" if there else "names no file: not used"
        advice = "unset it, unless the run is meant to use one"
        lines.append(Line("network", NOTE, f"RANK_TABLE_FILE {text}", advice))
    return lines or [Line("network", OK, f"interfaces {', '.join(names)}; nothing is prescribed")]


def _is_mine(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except (OSError, ValueError):
        return False
    return True


def matches_hccl(wanted: str, names: list[str]) -> bool:
    """Whether HCCL_SOCKET_IFNAME leaves an interface.

    Its words are beginnings of names, with ``=`` whole names; ``^`` before the list excludes.
    """
    excludes, rest = wanted.startswith("^"), wanted.removeprefix("^")
    whole, rest = rest.startswith("="), rest.removeprefix("=")
    words = [word for word in rest.split(",") if word]
    hits = [n for n in names if any(n == w if whole else n.startswith(w) for w in words)]
    return len(hits) < len(names) if excludes else bool(hits)
