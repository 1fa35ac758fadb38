"""HCCL's rank table: which card of which machine has which rank. Standard library only.

HCCL finds the cards by itself unless ``RANK_TABLE_FILE`` names such a table. torch_npu falls back
to finding them when there is no such file, and a wrong table is told at the first collective, in
HCCL's words; so the table is checked before a run starts.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo_common.errors import UserError, one_line

if TYPE_CHECKING:
    from zoo_common.preflight import Place

VARIABLE = "RANK_TABLE_FILE"
VISIBLE_VARIABLE = "ASCEND_RT_VISIBLE_DEVICES"
ADVICE = "tools/cluster/rank_table.py makes one"

_ADDRESS = re.compile(r"^address_(\d+)\s*=\s*(\S+)\s*$", re.MULTILINE)


class Card(NamedTuple):
    """A card of a rank table."""

    server: str
    device: int
    """Its physical number on its machine."""
    address: str
    """Of its own network port; empty if the table has none."""


def check(
    place: Place, first_card: int, environment: Mapping[str, str], root: Path = Path("/")
) -> None:
    """Checks the table that the environment names, if any and if HCCL will read it.

    Args:
        place: where the ranks of this machine are.
        first_card: index of the first card that this machine uses.
        environment: where ``RANK_TABLE_FILE`` and ``ASCEND_RT_VISIBLE_DEVICES`` are looked up.
        root: where ``/dev`` and ``/etc`` are.

    Raises:
        UserError: the file cannot be used, or does not describe this run or this machine.
    """
    name = environment.get(VARIABLE, "")
    if not name or place.device != "npu":
        return
    if place.fewest != place.nnodes:
        raise UserError(
            f"{VARIABLE}={name} describes fixed machines, which --nnodes={place.fewest}:"
            f"{place.nnodes} does not have: unset the variable or give one number of machines."
        )
    try:
        ranks = read(Path(name))
        if len(ranks) != place.world_size:
            raise ValueError(
                f"has {len(ranks)} ranks, but the run has {place.world_size}: {place.nnodes} "
                f"machine(s) with {place.processes} processes each"
            )
        first = place.node_rank * place.processes
        _check_own(
            ranks[first : first + place.processes],
            first,
            _cards(place, first_card, environment),
            root,
        )
    except ValueError as error:
        raise UserError(f"{VARIABLE}={name} {error}; {ADVICE}.") from error


def read(path: Path) -> list[Card]:
    """The cards of a table in the order of their ranks.

    Raises:
        ValueError: the file cannot be used; the message goes on after the file's name.
    """
    try:
        if path.is_symlink():
            raise ValueError("is a symbolic link, which HCCL refuses: name the file itself")
        if not path.is_file():
            raise ValueError("is no file")
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({one_line(error)})") from error
    if not isinstance(table, dict) or not isinstance(table.get("server_list"), list):
        raise ValueError("has no server_list")
    if table.get("status") != "completed":
        raise ValueError(f'has the status {table.get("status")!r:.40} instead of "completed"')
    cards = _by_rank(table["server_list"])
    count = table.get("server_count", str(len(table["server_list"])))
    if str(count) != str(len(table["server_list"])):
        raise ValueError(f"says server_count {count!r:.40} and lists {len(table['server_list'])}")
    missing = [rank for rank in range(len(cards)) if rank not in cards]
    if missing or not cards:
        raise ValueError(f"has no rank {missing[0] if missing else 0}: ranks count from 0 on")
    return [cards[rank] for rank in range(len(cards))]


def make(servers: Sequence[tuple[str, str]], devices: Sequence[int] | None = None) -> str:
    """The text of a table, ranks in the order of the machines and of their cards.

    Args:
        servers: a name that no other machine has, as its address, and the content of its
            ``/etc/hccn.conf``, machine 0 first.
        devices: the cards of each machine; None: all that its file has.

    Raises:
        ValueError: a file has no address of a card, or an address twice.
    """
    listed = []
    rank = 0
    for name, text in servers:
        addresses = {int(number): address for number, address in _ADDRESS.findall(text)}
        chosen = sorted(addresses) if devices is None else list(devices)
        absent = [number for number in chosen if number not in addresses]
        if absent or not chosen:
            line = f"address_{absent[0] if absent else 0}"
            raise ValueError(f"{name}: its hccn.conf has no line {line}=...")
        entries = []
        for number in chosen:
            entries.append(
                {
                    "device_id": str(number),
                    "device_ip": addresses[number],
                    "rank_id": str(rank),
                }
            )
            rank += 1
        listed.append({"server_id": name, "device": entries})
    _by_rank(listed)
    table = {
        "version": "1.0",
        "server_count": str(len(listed)),
        "server_list": listed,
        "status": "completed",
    }
    return json.dumps(table, indent=1) + "\n"


def _by_rank(servers: Sequence[Any]) -> dict[int, Card]:
    cards: dict[int, Card] = {}
    seen: set[object] = set()
    names: set[str] = set()
    for number, server in enumerate(servers):
        name = server.get("server_id") if isinstance(server, dict) else None
        devices = server.get("device") if isinstance(server, dict) else None
        if not isinstance(name, str) or not name or not isinstance(devices, list):
            raise ValueError(f"has no server_id and device list at entry {number} of server_list")
        if name in names:
            raise ValueError(f"has the server_id {name!r} twice")
        names.add(name)
        for device in devices:
            rank, card = _card(name, device, len(servers) > 1)
            if rank in cards:
                raise ValueError(f"has the rank {rank} twice")
            if (name, card.device) in seen or (card.address and card.address in seen):
                raise ValueError(
                    f"has the card {card.device} of {name}, or its address {card.address}, twice"
                )
            cards[rank] = card
            seen |= {(name, card.device), card.address}
    return cards


def _card(server: str, device: Any, needs_address: bool) -> tuple[int, Card]:
    numbers = []
    for key in ("rank_id", "device_id"):
        value = device.get(key) if isinstance(device, dict) else None
        if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,6}", value):
            raise ValueError(f"has a card of {server} whose {key} is {value!r:.40} and no number")
        numbers.append(int(value))
    address = device.get("device_ip", "")
    if address or needs_address:
        try:
            ipaddress.ip_address(str(address))
        except ValueError:
            raise ValueError(
                f"has a card of {server} whose device_ip is {address!r:.40} and no address"
            ) from None
    return numbers[0], Card(server, numbers[1], str(address))


def _cards(place: Place, first_card: int, environment: Mapping[str, str]) -> list[int]:
    """Which of the machine's cards its processes use, in the order that the driver shows."""
    wanted = range(first_card, first_card + place.processes)
    visible = environment.get(VISIBLE_VARIABLE, "")
    if not visible:
        return list(wanted)
    shown = [int(part) for part in visible.split(",") if part.strip().isdecimal()]
    return [shown[index] for index in wanted if index < len(shown)]


def _check_own(own: Sequence[Card], first: int, cards: Sequence[int], root: Path) -> None:
    """Whether the ranks of this machine are its own cards, as far as the machine tells."""
    servers = list(dict.fromkeys(card.server for card in own))
    if len(servers) > 1:
        raise ValueError(
            f"gives the ranks {first} to {first + len(own) - 1} of this machine to "
            f"{' and '.join(servers)}"
        )
    shown = sorted(
        int(path.name.removeprefix("davinci")) for path in (root / "dev").glob("davinci[0-9]*")
    )
    physical = [shown[card] if card < len(shown) else card for card in cards]
    listed = [card.device for card in own]
    if listed != physical:
        raise ValueError(
            f"gives the ranks from {first} on the cards {_text(listed)} of {servers[0]}, but they "
            f"run on the cards {_text(physical)} of this machine"
        )
    try:
        text = (root / "etc" / "hccn.conf").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return  # a container has none
    addresses = {int(number): address for number, address in _ADDRESS.findall(text)}
    for card in own:
        mine = addresses.get(card.device, card.address)
        if card.address and mine != card.address:
            raise ValueError(
                f"gives card {card.device} of {card.server} the address {card.address}, but "
                f"/etc/hccn.conf of this machine says {mine}"
            )


def _text(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
