"""What the predict programs of all models share: how they end, and which network is meant."""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from zoo_common.config import CardOptions, load_config
from zoo_common.errors import UserError

ConfigT = TypeVar("ConfigT")


def exit_code(name: str, work: Callable[[], None]) -> int:
    """Does a program's work and tells a mistake of its user in one line.

    Args:
        name: the program's, which the line begins with.
        work: all that it does.
    """
    try:
        work()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def network_config(
    schema: type[ConfigT],
    card_options: CardOptions,
    checkpoint: Path,
    file: Path | None,
    settings: Sequence[str],
) -> ConfigT:
    """The settings of a network: a file's, else its run's, which lie beside the checkpoint.

    Args:
        schema: the model's config.
        card_options: its further names of settings.
        checkpoint: the weights; of a run of this zoo they are in ``OUTPUT_DIR/checkpoints``.
        file: what the user names instead.
        settings: what the user changes in them; with neither file nor run, in the defaults.

    Raises:
        UserError: a setting is wrong.
    """
    words = list(settings)
    if file is not None:
        words = [f"--config={file}", *words]
    elif (recorded := checkpoint.resolve().parent.parent / "config.yaml").is_file():
        words = [f"--config={recorded}", *words]
    return load_config(schema, words, card_options)
