"""A run whose number of processes changes: its recipe, and where it goes on.

A recipe is written for the most machines of ``--nnodes=MIN:MAX``. With fewer each process keeps
its batch, so that a step has fewer images: learning rates follow the images of a step linearly,
and counts of steps inversely, so that the run sees as many images as planned. Each model's
``for_world`` says which of its settings those are.

A run that goes on with another global batch keeps its whole epochs. Of the epoch under way it
counts the images that were met in its own steps, rounded up: less than one global batch is left
out, and no image is met twice. ``Met`` tells the order of that epoch what was met, and how.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from zoo_common.config import node_range
from zoo_common.errors import UserError

if TYPE_CHECKING:
    from zoo_common.run import TrainState


ConfigT = TypeVar("ConfigT")

# ---------------------------------------------------------------------------- recipes


def share(config: Any, world_size: int) -> Fraction:
    """The processes that there are, as a share of those that the recipe is written for.

    Args:
        config: a model's config; its ``launch.processes`` is what the launcher resolved.
        world_size: processes on all machines.

    Raises:
        UserError: a number of machines that may change, without the processes of each.
    """
    least, most = node_range(config.launch)
    if least == most:
        return Fraction(1)
    if not config.launch.processes:
        raise UserError(
            f"launch.nnodes={config.launch.nnodes} needs launch.processes, those of each machine, "
            "where no script of test/ starts the run: set it."
        )
    return Fraction(world_size, config.launch.processes * most)


def scaled(config: ConfigT, world_size: int) -> tuple[ConfigT, Fraction]:
    """A copy of a config with the step counts fitted that every model has, and the share.

    Args:
        config: a model's config.
        world_size: processes on all machines.

    Raises:
        UserError: as of :func:`share`.
    """
    part = share(config, world_size)
    copied: Any = copy.deepcopy(config)
    copied.run.max_steps = steps_for(copied.run.max_steps, part)
    copied.run.save_every = steps_for(copied.run.save_every, part)
    return copied, part


def steps_for(steps: int, share: Fraction) -> int:
    """As many steps of another size as have the images of ``steps``; one at least, unless 0."""
    return max(1, math.floor(steps / share + Fraction(1, 2))) if steps else 0


def batch_for(batch_size: int, share: Fraction) -> int:
    """The images of a step over all processes, where each process keeps its own.

    Raises:
        UserError: the recipe's batch does not divide over its processes.
    """
    scaled = batch_size * share
    if scaled.denominator > 1:
        raise UserError(
            f"data.batch_size={batch_size} counts the images of all processes together and does "
            "not divide over those of the MAX of --nnodes=MIN:MAX: take a multiple (--batch_size)."
        )
    return int(scaled)


def average_for(decay: float, share: Fraction) -> float:
    """The share of a weight average that a step keeps, so that an image moves it as far."""
    return math.pow(decay, share)


# ---------------------------------------------------------------------------- position


class Met(NamedTuple):
    """Steps at the start of an epoch, or behind those of another ``Met``, and who took them.

    Attributes:
        epoch: the epoch, from 0.
        stop: the steps of the epoch that were finished then, in steps of this size.
        world_size: processes that took part.
        batch_size: images of a step of each.
    """

    epoch: int
    stop: int
    world_size: int
    batch_size: int

    @property
    def global_batch(self) -> int:
        """Images of a step over all processes."""
        return self.world_size * self.batch_size

    def steps_of(self, global_batch: int) -> int:
        """What was met, in steps of another size, rounded up."""
        return -(-self.stop * self.global_batch // global_batch)


def position(state: TrainState[Any], world_size: int) -> dict[str, Any]:
    """What a checkpoint tells of a run's place in its data, beside ``step``.

    Args:
        state: the run.
        world_size: processes on all machines.
    """
    return {
        "global_batch": state.global_batch,
        "steps_per_epoch": state.data.steps_per_epoch,
        "total_steps": state.total_steps,
        "world_size": world_size,
        "met": [tuple(part) for part in state.met],
    }


def step_at(content: Mapping[str, Any], state: TrainState[Any]) -> int:
    """Where a run goes on: finished steps, counted in steps of its own size.

    Args:
        content: a checkpoint, with what :func:`position` gave unless it is an older one.
        state: the run that goes on.
    """
    step = int(content["step"])
    if not _converts(content, state):
        return step
    epoch, place = divmod(step, int(content["steps_per_epoch"]))
    images = place * int(content["global_batch"])
    per_epoch = state.data.steps_per_epoch
    return epoch * per_epoch + min(per_epoch, -(-images // state.global_batch))


def met_before(
    content: Mapping[str, Any], state: TrainState[Any], world_size: int
) -> tuple[Met, ...]:
    """What other processes met of the epoch under way, and in which steps.

    Args:
        content: as :func:`step_at`.
        state: the run that goes on.
        world_size: its processes on all machines.
    """
    if "met" not in content:
        return ()
    batch, processes = content["global_batch"], content["world_size"]
    if batch != state.global_batch and not _converts(content, state):
        return ()
    epoch, place = divmod(content["step"], content["steps_per_epoch"])
    parts = [Met(*part) for part in content["met"]]
    kept = [part for part in parts if part.epoch == epoch]
    if (batch, processes) != (state.global_batch, world_size) and place:
        kept.append(Met(epoch, place, processes, batch // processes))
    return tuple(kept)


def describe(content: Mapping[str, Any], state: TrainState[Any]) -> str | None:
    """A sentence for the log about a global batch that changed; None if it did not."""
    before = content.get("global_batch", state.global_batch)
    if before == state.global_batch:
        return None
    changed = f"{state.global_batch} images a step, {before} before"
    if _converts(content, state):
        return f"{changed}: step {content['step']} is step {step_at(content, state)} now"
    return (
        f"{changed}, and the plan of {state.total_steps} steps did not follow: the step number "
        "stays, and the epoch under way begins elsewhere"
    )


def _converts(content: Mapping[str, Any], state: TrainState[Any]) -> bool:
    """Whether the plan of steps followed another global batch, so that the position does."""
    before = int(content.get("global_batch", state.global_batch))
    if before == state.global_batch:
        return False
    planned, per_epoch = int(content["total_steps"]), int(content["steps_per_epoch"])
    now, now_per_epoch = state.total_steps, state.data.steps_per_epoch
    if planned == now:  # the same steps: the plan is one of steps, unless epochs have as many
        return per_epoch == now_per_epoch
    if planned % per_epoch == 0 and now % now_per_epoch == 0:
        return True  # whole epochs, perhaps more of them than before
    # A plan in epochs is short of less than one global batch in each, by rounding as much again.
    epochs = 1 + min(planned // per_epoch, now // now_per_epoch)
    spare = max(before, state.global_batch) * epochs
    return abs(planned * before - now * state.global_batch) <= spare
