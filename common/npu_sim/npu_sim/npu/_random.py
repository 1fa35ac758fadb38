"""Random numbers of the cards. Before the NPU has started, seeds and states wait for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from npu_sim.npu import _lazy
from npu_sim.npu._device import Device


def _index(device: Device) -> int:
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "npu":
        raise ValueError(f"{device.type} doesn't match the current accelerator npu.")
    return _current() if device.index is None else int(device.index)


def _current() -> int:
    return int(torch._C._accelerator_hooks_get_current_device())


def get_rng_state(device: Device = "npu") -> torch.Tensor:
    """The state of a card's generator, a byte tensor on the CPU."""
    _lazy.lazy_init()
    return _lazy.get_default_generator(_index(device)).get_state()


def get_rng_state_all() -> list[torch.Tensor]:
    """The states of all cards."""
    return [get_rng_state(index) for index in range(_lazy.device_count())]


def set_rng_state(new_state: torch.Tensor, device: Device = "npu") -> None:
    """Sets the state of a card's generator."""
    state = new_state.clone()
    _lazy.lazy_call(lambda: _lazy.get_default_generator(_index(device)).set_state(state))


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """Sets the states of the cards, in order."""
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


def manual_seed(seed: int) -> None:
    """Seeds the current card."""
    number = int(seed)
    _lazy.lazy_call(lambda: _lazy.get_default_generator(_current()).manual_seed(number))


def manual_seed_all(seed: int) -> None:
    """Seeds all cards alike."""
    number = int(seed)

    def seed_each() -> None:
        for index in range(_lazy.device_count()):
            _lazy.get_default_generator(index).manual_seed(number)

    _lazy.lazy_call(seed_each)


def seed() -> None:
    """Gives the current card a random seed."""
    _lazy.lazy_call(lambda: _lazy.get_default_generator(_current()).seed())


def seed_all() -> None:
    """Gives all cards the same random seed."""

    def seed_each() -> None:
        first = _lazy.get_default_generator(0).seed()
        for index in range(1, _lazy.device_count()):
            _lazy.get_default_generator(index).manual_seed(first)

    _lazy.lazy_call(seed_each)


def initial_seed() -> int:
    """The seed of the current card."""
    _lazy.lazy_init()
    return _lazy.get_default_generator(_current()).initial_seed()
