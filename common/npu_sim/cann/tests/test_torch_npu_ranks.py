"""The real ProcessGroupHCCL between two processes, on the stand-in HCCL."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import Done, Machine

_RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _both(machine: Machine, check: str, **variables: str) -> list[Done]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = str(Path(__file__).with_name("ranks.py"))
    with ThreadPoolExecutor(2) as pool:
        return list(
            pool.map(
                lambda rank: machine.python(_RUN, script, check, str(rank), port, **variables),
                range(2),
            )
        )


def test_collectives(machine: Machine) -> None:
    for rank, done in enumerate(_both(machine, "collectives", TASK_QUEUE_ENABLE="2")):
        assert done.result() == {
            "sum torch.float32": [3.0] * 5,
            "sum torch.float16": [3.0] * 5,
            "sum torch.bfloat16": [3.0] * 5,
            "sum torch.int64": [3.0] * 5,
            "sum torch.bool": [1.0] * 5,
            "average": [0.5],
            "largest": [1, 1],
            "broadcast": [1.0, 1.0],
            "gathered": [[0.0] * 3, [1.0] * 3],
            "reduced part": [[0.0, 2.0], [4.0, 6.0]][rank],
            "swapped": [[0.0, 10.0], [1.0, 11.0]][rank],
            "received": [1.0, 1.0],
            "objects": [{"rank": 0}, {"rank": 1}],
        }


def test_hccl_refuses(machine: Machine) -> None:
    """Types and reductions that HCCL has not: an error, never a wrong number."""
    for done in _both(machine, "refusals"):
        said = done.result()
        assert "Unsupported data type" in said["float64"] or "float64" in said["float64"].lower()
        assert said["bitwise"] != "no error"
        assert said["uint8"] != "no error"


def test_sync_batch_norm(machine: Machine) -> None:
    for done in _both(machine, "sync_batch_norm"):
        assert max(done.result().values()) < 1e-4


def test_a_dead_rank_ends_the_others(machine: Machine) -> None:
    said, seconds = _both(machine, "death", HCCL_EXEC_TIMEOUT="20")[0].result()
    assert said != "no error"
    assert seconds < 60
