"""Rank tables: what is made is taken, and each way to be wrong is told before a run starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zoo_common import rank_table
from zoo_common.errors import UserError
from zoo_common.preflight import Place

CONF = """\
address_0=192.168.{net}.10
netmask_0=255.255.255.0
address_1=192.168.{net}.11
"""
SERVERS = [(f"10.0.0.{net}", CONF.format(net=net)) for net in (1, 2)]


def place(node_rank: int = 0, **changes: Any) -> Place:
    settings = {"device": "npu", "processes": 2, "nnodes": 2} | changes
    return Place(node_rank=node_rank, master_addr="10.0.0.1", master_port=1, **settings)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of a machine with two cards, the second of the run."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "etc").mkdir()
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (tmp_path / "dev" / name).touch()
    (tmp_path / "etc" / "hccn.conf").write_text(CONF.format(net=2))
    return tmp_path


def write(directory: Path, change: Callable[[dict[str, Any]], object] | None = None) -> str:
    table = json.loads(rank_table.make(SERVERS))
    if change is not None:
        change(table)
    file = directory / "rank table.json"
    file.write_text(json.dumps(table))
    return str(file)


def told(machine: Path, file: str, where: Place | None = None, **environment: str) -> str:
    with pytest.raises(UserError) as caught:
        variables = {"RANK_TABLE_FILE": file, **environment}
        rank_table.check(where or place(1), 0, variables, machine)
    message = str(caught.value)
    assert message.startswith(f"RANK_TABLE_FILE={file} ")
    assert "\n" not in message
    return message


def test_a_made_table_fits_its_machines(machine: Path) -> None:
    file = write(machine)
    cards = rank_table.read(Path(file))
    assert [(card.server, card.device) for card in cards] == [
        ("10.0.0.1", 0),
        ("10.0.0.1", 1),
        ("10.0.0.2", 0),
        ("10.0.0.2", 1),
    ]
    rank_table.check(place(1), 0, {"RANK_TABLE_FILE": file}, machine)


def test_a_table_can_have_some_cards_which_the_run_must_use(machine: Path) -> None:
    file = machine / "one.json"
    file.write_text(rank_table.make(SERVERS, [1]))
    one = place(1, processes=1)
    rank_table.check(one, 1, {"RANK_TABLE_FILE": str(file)}, machine)
    visible = {"RANK_TABLE_FILE": str(file), "ASCEND_RT_VISIBLE_DEVICES": "1"}
    rank_table.check(one, 0, visible, machine)
    message = told(machine, str(file), one)
    assert (
        "gives the ranks from 1 on the cards 1 of 10.0.0.2, but they run on the cards 0" in message
    )


def test_cards_have_their_physical_numbers_in_a_container(machine: Path) -> None:
    for number in (0, 1):
        (machine / "dev" / f"davinci{number}").rename(machine / "dev" / f"davinci{number + 6}")
    (machine / "etc" / "hccn.conf").unlink()
    text = CONF.replace("_0", "_6").replace("_1=", "_7=")
    file = machine / "six.json"
    file.write_text(rank_table.make([(name, text.format(net=name[-1])) for name, _ in SERVERS]))
    rank_table.check(place(1), 0, {"RANK_TABLE_FILE": str(file)}, machine)


@pytest.mark.parametrize(
    ("where", "environment"),
    [(place(device="cpu"), {"RANK_TABLE_FILE": "nowhere"}), (place(), {})],
)
def test_a_table_that_hccl_does_not_read_is_not_read(
    where: Place, environment: dict[str, str]
) -> None:
    rank_table.check(where, 0, environment)


def devices(table: dict[str, Any], server: int = 1) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = table["server_list"][server]["device"]
    return listed


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "status": (lambda t: t.update(status="initializing"), "has the status 'initializing' instead"),
    "no list": (lambda t: t.pop("server_list"), "has no server_list"),
    "empty": (lambda t: t.update(server_list=[], server_count="0"), "has no rank 0"),
    "count": (lambda t: t.update(server_count="3"), "says server_count '3' and lists 2"),
    "no name": (lambda t: t["server_list"][0].pop("server_id"), "has no server_id and device list"),
    "name twice": (
        lambda t: t["server_list"][0].update(server_id="10.0.0.2"),
        "has the server_id '10.0.0.2' twice",
    ),
    "rank": (lambda t: devices(t)[0].update(rank_id=2), "whose rank_id is 2 and no number"),
    "rank twice": (lambda t: devices(t)[0].update(rank_id="1"), "has the rank 1 twice"),
    "rank missing": (lambda t: devices(t)[1].update(rank_id="7"), "has no rank 3"),
    "card twice": (lambda t: devices(t)[1].update(device_id="0"), "has the card 0 of 10.0.0.2"),
    "address twice": (
        lambda t: devices(t)[1].update(device_ip="192.168.1.11"),
        "or its address 192.168.1.11, twice",
    ),
    "no address": (
        lambda t: devices(t)[1].pop("device_ip"),
        "whose device_ip is '' and no address",
    ),
    "address": (lambda t: devices(t)[1].update(device_ip="eth0"), "'eth0' and no address"),
    "another's address": (
        lambda t: devices(t)[1].update(device_ip="192.168.9.9"),
        "/etc/hccn.conf of this machine says 192.168.2.11",
    ),
    "world size": (lambda t: devices(t).pop(), "has 3 ranks, but the run has 4: 2 machine(s)"),
    "two machines": (
        lambda t: (devices(t)[1].update(rank_id="0"), devices(t, 0)[0].update(rank_id="3")),
        "gives the ranks 2 to 3 of this machine to 10.0.0.2 and 10.0.0.1",
    ),
    "order": (
        lambda t: (devices(t)[0].update(rank_id="3"), devices(t)[1].update(rank_id="2")),
        "on the cards 1, 0 of 10.0.0.2, but they run on the cards 0, 1 of this machine",
    ),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_a_wrong_table_is_told_in_a_sentence(machine: Path, case: str) -> None:
    change, said = WRONG[case]
    message = told(machine, write(machine, change))
    assert said in message
    assert "tools/cluster/rank_table.py makes one" in message


def test_a_file_that_cannot_be_used_is_told(machine: Path) -> None:
    link = machine / "link.json"
    link.symlink_to(write(machine))
    assert "is a symbolic link, which HCCL refuses" in told(machine, str(link))
    assert "is no file" in told(machine, str(machine / "absent.json"))
    assert "cannot be read (File name too long)" in told(machine, str(machine / ("x" * 300)))
    text = machine / "text.json"
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        text.write_bytes(content)
        assert "is not valid JSON" in told(machine, str(text))


def test_machines_that_come_and_go_have_no_table(machine: Path) -> None:
    assert "describes fixed machines" in told(machine, write(machine), place(1, min_nodes=1))


@pytest.mark.parametrize(("text", "devices"), [("", None), (CONF.format(net=1), [0, 2])])
def test_a_machine_without_addresses_has_no_table(text: str, devices: list[int] | None) -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.1: its hccn\.conf has no line address_[02]="):
        rank_table.make([("10.0.0.1", text)], devices)


def test_two_files_of_one_machine_make_no_table() -> None:
    with pytest.raises(ValueError, match=r"its address 192\.168\.1\.10, twice"):
        rank_table.make([("10.0.0.1", SERVERS[0][1]), ("10.0.0.2", SERVERS[0][1])])
