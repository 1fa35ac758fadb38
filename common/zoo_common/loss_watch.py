"""Watches the losses of a run: not finite, or far above those of the steps before.

A loss is a spike when it is above

    median + factor * max((high - median) / 1.645, 0.1 * |median|, 0.01 * |start|)

of this rank's latest losses; high is what one in 20 of them is above, which makes the first term
a normal distribution's standard deviation, and start is the median of the run's first losses.
What is usual is measured above the median only: losses of a few images have a long tail there, and
beside their median distance from the median every hard picture is a spike. The second term keeps a
smooth curve from being judged by its own smoothness, the third a loss near 0, where a run that has
learnt its data has no other measure of what is large. So with the usual factor of 20 a loss has to
be three times what it was, wherever 0 is, and only a rise counts.

Losses stay on the device until :meth:`LossWatch.check` reads all of them at once, at log steps
and before a checkpoint is written. On a CPU, where reading waits for nothing, each is checked
before its backward pass. A rank that finds a bad one ends, and so the run does, with its words.

Under ``--skip_bad_steps`` each loss is read, and all ranks agree over gloo before any of them
steps: a step that is bad on one rank is left out on all.
"""

import bisect
import copy
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zoo_common import distributed
from zoo_common.errors import TrainingError

JUDGED_FROM = 32  # losses: with fewer before it none is a spike
REMEMBERED = 512  # losses that a new one is compared with
NAMED_IMAGES = 16  # in a message; this rank's log has all of them


class Stateful(Protocol):
    """What can give its state and take it back."""

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Puts back what :meth:`state_dict` gave."""


class RecentLosses:
    """The latest good losses of a rank, and whether another one is a spike beside them.

    Args:
        factor: as in the head of this file; with 0 nothing is a spike.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []
        self._start: float | None = None

    @property
    def median(self) -> float:
        """Of the latest losses."""
        middle = len(self._sorted) // 2
        if len(self._sorted) % 2:
            return self._sorted[middle]
        return (self._sorted[middle - 1] + self._sorted[middle]) / 2

    def is_spike(self, loss: float) -> bool:
        """Whether ``loss``, a finite number, is far above the others."""
        if self._factor == 0 or self._start is None:
            return False
        median = self.median
        high = self._sorted[int(0.95 * (len(self._sorted) - 1))]
        scale = max((high - median) / 1.645, 0.1 * abs(median), 0.01 * abs(self._start))
        return loss > median + self._factor * scale

    def add(self, loss: float) -> None:
        """Remembers a good loss in place of the oldest."""
        self._latest.append(loss)
        bisect.insort(self._sorted, loss)
        if len(self._latest) > REMEMBERED:
            del self._sorted[bisect.bisect_left(self._sorted, self._latest.popleft())]
        if self._start is None and len(self._latest) == JUDGED_FROM:
            self._start = self.median

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"start": self._start, "latest": list(self._latest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        self._latest = deque(state["latest"])
        self._sorted = sorted(self._latest)
        self._start = state["start"]


@dataclass(frozen=True)
class BadLoss:
    """A loss that is not finite, or a spike.

    Attributes:
        step: the step that it is of.
        rank: the rank that met it.
        losses: its parts by name.
        usual: the median of those before; None for one that is not finite.
        images: names of the images that it is of.
    """

    step: int
    rank: int
    losses: dict[str, float]
    usual: float | None
    images: tuple[str, ...]

    def describe(self) -> str:
        """What, where and of which images, the start of a sentence."""
        what, usual = "is not finite", ""
        if self.usual is not None:
            what = f"rose to {math.fsum(self.losses.values()):g}"
            usual = f", where {self.usual:g} is usual"
        return (
            f"The loss {what} ({_parts(self.losses)}) on rank {self.rank} at step {self.step}"
            f"{usual}; its images are {name_images(self.images)}"
        )


class LossWatch:
    """The loss parts since the last log step, and the judge of every loss.

    With gradient accumulation each micro-batch has a loss of its own here.

    Args:
        rank: this process's rank.
        say: writes a line into this rank's log.
        spike_factor: as in the head of this file; 0 looks for no spikes.
        skips: bad steps that may be left out; with 0 the first one ends the run.

    Attributes:
        skips: as above.
        bad_steps: steps left out, since the start of the run; the same on every rank.
    """

    def __init__(
        self,
        rank: int,
        say: Callable[[str], None] = print,
        *,
        spike_factor: float,
        skips: int = 0,
    ) -> None:
        self.skips = skips
        self.bad_steps = 0
        self._rank = rank
        self._say = say
        self._recent = RecentLosses(spike_factor)
        self._names: list[str] = []
        self._unread: list[tuple[int, Tensor, Sequence[str]]] = []
        self._read: list[list[float]] = []
        self._under_way: tuple[int, Tensor, Sequence[str]] | None = None

    def add(self, step: int, losses: Mapping[str, Tensor], item_ids: Sequence[str]) -> None:
        """Takes the losses of a (micro-)batch; reads nothing.

        Args:
            step: the step under way.
            losses: scalars by name.
            item_ids: names of the images.
        """
        self._names = list(losses)
        values = torch.stack([value.detach().float() for value in losses.values()])
        self._under_way = (step, values, item_ids)
        self._unread.append(self._under_way)

    def check(self) -> None:
        """Reads the losses that were added since the last call, and judges them in order.

        Raises:
            TrainingError: one is not finite, or a spike.
        """
        bad = self._judge()
        if bad is not None:
            raise TrainingError(
                f"{bad.describe()}: look at them, or lower the learning rate, and continue with "
                "--resume, if need be with --skip_bad_steps=10."
            )

    def leaves_out(self) -> list[BadLoss]:
        """Reads the loss that was added last, and agrees with all ranks on what becomes of it.

        Every rank calls it after each :meth:`add`. Once one of a step's micro-batches is bad, the
        step is left out; it counts once.

        Returns:
            What is bad, in order of rank, the same on every rank; nothing for a good step.

        Raises:
            TrainingError: a step is bad after ``skips`` others were left out.
        """
        assert self._under_way is not None
        own = self._judge()
        if not int(distributed.max_across(torch.tensor([int(own is not None)]))):
            return []
        found = distributed.gather_results([own] if own is not None else [])
        if own is None:
            del self._read[-1]  # good here, but of a step that is left out
        return found

    def count(self, found: Sequence[BadLoss]) -> None:
        """Counts a step that is left out for ``found``.

        Raises:
            TrainingError: there were enough of them.
        """
        if self.bad_steps == self.skips:
            raise TrainingError(
                f"{found[0].describe()}: {self.skips} such steps were left out already, and "
                "--skip_bad_steps allows no more; look at the images, or lower the learning rate, "
                "and continue with --resume."
            )
        self.bad_steps += 1

    def means(self) -> dict[str, float]:
        """Means over ranks and over the checked losses since the last call; empty without any."""
        read, self._read = self._read, []
        if not read:
            return {}
        own = [math.fsum(column) / len(read) for column in zip(*read, strict=True)]
        means = distributed.mean_across(torch.tensor(own, dtype=torch.float32)).tolist()
        return dict(zip(self._names, means, strict=True))

    def name_step(self) -> str:
        """The step under way with its loss parts and images, for an error; reads the device."""
        assert self._under_way is not None
        step, values, item_ids = self._under_way
        self._tell_images(step, item_ids)
        parts = _parts(dict(zip(self._names, values.tolist(), strict=True)))
        return f"step {step} on rank {self._rank} ({parts}; its images are {name_images(item_ids)})"

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the count, and what spikes are measured by, of this rank."""
        return {"bad_steps": self.bad_steps, "recent": self._recent.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`; every rank may take the same one's."""
        self.bad_steps = state["bad_steps"]
        self._recent.load_state_dict(state["recent"])

    def _judge(self) -> BadLoss | None:
        """Reads what is unread; the first bad loss, if any."""
        unread, self._unread = self._unread, []
        if not unread:
            return None
        rows = torch.stack([values for _, values, _ in unread]).tolist()
        for (step, _, item_ids), row in zip(unread, rows, strict=True):
            finite = all(math.isfinite(value) for value in row)
            if not finite or self._recent.is_spike(math.fsum(row)):
                usual = self._recent.median if finite else None
                losses = dict(zip(self._names, row, strict=True))
                self._tell_images(step, item_ids)
                return BadLoss(step, self._rank, losses, usual, tuple(item_ids))
            self._recent.add(math.fsum(row))
            self._read.append(row)
        return None

    def _tell_images(self, step: int, item_ids: Sequence[str]) -> None:
        if len(item_ids) > NAMED_IMAGES:
            self._say(f"images of step {step}: {', '.join(item_ids)}")


class Snapshot:
    """What the forward passes of a step change, to be put back when the step is left out.

    That is the model's buffers, such as the statistics of its norms, and parts that each rank has
    of its own, such as a queue of features. Both are copied on the device.

    Args:
        model: the model.
        parts: what has a state and changes in forward passes.
    """

    def __init__(self, model: nn.Module, parts: Sequence[Stateful]) -> None:
        self._buffers = [buffer.detach() for buffer in model.buffers()]
        self._copies = [torch.empty_like(buffer) for buffer in self._buffers]
        self._parts = parts
        self._states: list[dict[str, Any]] = []

    def take(self) -> None:
        """Copies all as it is, in place of the last copy."""
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)
        self._states = [copy.deepcopy(part.state_dict()) for part in self._parts]

    def put_back(self) -> None:
        """Makes all as it was; after the backward passes, which may need it as it is."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._copies)
        for part, state in zip(self._parts, self._states, strict=True):
            part.load_state_dict(state)


def name_images(item_ids: Sequence[str]) -> str:
    """Names in a row, not more than :data:`NAMED_IMAGES`."""
    more = len(item_ids) - NAMED_IMAGES
    named = ", ".join(item_ids[:NAMED_IMAGES])
    return named if more <= 0 else f"{named} and {more} more"


def _parts(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in losses.items())
