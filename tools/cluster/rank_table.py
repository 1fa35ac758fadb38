"""Makes a rank table for HCCL from each machine's /etc/hccn.conf, for sites that need one.

    ssh node0 cat /etc/hccn.conf > node0.conf
    ssh node1 cat /etc/hccn.conf > node1.conf
    python tools/cluster/rank_table.py 10.0.0.1=node0.conf 10.0.0.2=node1.conf > rank_table.json

The machines stand in the order of their --node_rank. Copy the table to each of them and start the
run there with RANK_TABLE_FILE=/path/of/rank_table.json. The table is of version 1.0, for Atlas 800
and A2; super pods (A3) need one of version 1.2, which their own tools write.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "common"))

from zoo_common import rank_table


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("machines", nargs="+", metavar="ADDRESS=FILE")
    parser.add_argument(
        "--devices", metavar="0,1,...", help="the cards of each machine to use; all if not given"
    )
    arguments = parser.parse_args(argv)
    try:
        devices = None
        if arguments.devices is not None:
            devices = [int(number) for number in arguments.devices.split(",")]
        servers = []
        for word in arguments.machines:
            address, _, file = word.partition("=")
            if not address or not file:
                raise ValueError(f"{word}: write ADDRESS=FILE")
            servers.append((address, Path(file).read_text(encoding="utf-8")))
        print(rank_table.make(servers, devices), end="")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
