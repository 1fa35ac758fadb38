"""A long run of many processes: nothing grows, nothing slows down, and nothing is missing."""

import sys

import pytest
from harness import ROOT

sys.path.insert(0, str(ROOT / "tools" / "bench"))

import load

MOST_GROWTH_PERCENT = 2
MOST_SLOWER_PERCENT = 5


@pytest.mark.thorough
@pytest.mark.alone
def test_two_thousand_steps_of_eight_processes_end_as_they_began() -> None:
    """A checkpoint every 50 steps, an evaluation every 200."""
    found = load.measure(processes=8, steps=2000)
    assert {growth.name for growth in found.growths} == {
        "launcher",
        *map("rank {}".format, range(8)),
    }
    for growth in found.growths:
        assert growth.memory_percent < MOST_GROWTH_PERCENT, growth
        assert growth.files[1] <= growth.files[0], growth
        assert growth.threads[1] <= growth.threads[0], growth
    assert found.faults == []
    assert found.slower_percent < MOST_SLOWER_PERCENT, found.images_per_sec


def test_the_record_of_a_short_run_is_complete() -> None:
    """A run so short shows no growth; the thorough one does."""
    assert load.measure(processes=2, steps=250, step_time_s=0).faults == []
