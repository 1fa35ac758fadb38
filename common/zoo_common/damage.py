"""Counts the damaged images of a run, names them, and ends it when there are too many."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from zoo_common.errors import UserError

_log = logging.getLogger(__name__)

_NAMES_SHOWN = 10
_NAMES_KEPT = 1000
_FEW_READ = 1000


class Damaged(NamedTuple):
    """An image that cannot be read, and why."""

    item_id: str
    reason: str


class DamagedItems:
    """Counts and names the damaged images of a run, each file once, up to a limit.

    Args:
        limit: How many damaged images one process accepts.
        what: What is done with one, for the log: ``replaced`` or ``left out``.
    """

    def __init__(self, limit: int, what: str) -> None:
        self.limit = limit
        self.found: dict[str, str] = {}
        self._what = what

    def add(self, items: Iterable[Damaged]) -> None:
        """Counts and logs those that are new.

        Raises:
            UserError: There are more than the limit; the message lists them.
        """
        for item_id, reason in items:
            if item_id not in self.found:
                self.found[item_id] = reason
                _log.warning("damaged image %s: %s (%s)", self._what, item_id, reason)
        if len(self.found) > self.limit:
            raise UserError(
                f"{len(self.found)} images are damaged, more than the {self.limit} that are "
                f"allowed: {_names(self.found)}; restore or remove these files, "
                "or allow more with max_damaged"
            )


class DamagedShare:
    """Counts the damaged images of a run up to a share of what was read; for sets of millions.

    An image that is met again counts again, as what was read does. Names are kept and logged for
    the first 1,000 only.

    Args:
        share: Damaged images that one process accepts, as a share of the images that it read; of
            1,000, while it has read fewer.
        batch_size: Images that are read for a batch.
        what: What is done with one, for the log: ``replaced`` or ``left out``.
    """

    def __init__(self, share: float, batch_size: int, what: str) -> None:
        self.share = share
        self.read = 0
        self.count = 0
        self.found: dict[str, str] = {}
        self._batch_size = batch_size
        self._what = what

    def add(self, items: Iterable[Damaged]) -> None:
        """Counts a batch and logs what is new in it.

        Raises:
            UserError: There are more than the share; the message lists some.
        """
        self.read += self._batch_size
        for item in items:
            self.count += 1
            self._name(item)
        if self.count > self.share * max(self.read, _FEW_READ):
            raise UserError(
                f"{self.count} of the {self.read} images that were read are damaged, more than a "
                f"share of {self.share:g}, among them {_names(self.found)}; restore these files "
                "or remove them from the list, or allow more with max_damaged"
            )

    def _name(self, item: Damaged) -> None:
        if item.item_id in self.found or len(self.found) == _NAMES_KEPT:
            return
        self.found[item.item_id] = item.reason
        _log.warning("damaged image %s: %s (%s)", self._what, item.item_id, item.reason)
        if len(self.found) == _NAMES_KEPT:
            _log.warning("%d damaged images were named; any other is counted only", len(self.found))


def _names(found: Mapping[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in found.items()][:_NAMES_SHOWN]
    more = len(found) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
