"""Damage is counted as a share of what was read, and named as far as names are of use."""

import logging

import pytest

from zoo_common.damage import Damaged, DamagedShare
from zoo_common.errors import UserError


def pass_batch(share: DamagedShare, names: list[str]) -> None:
    share.add([Damaged(name, "cut off") for name in names])


def test_a_share_of_what_was_read_is_allowed() -> None:
    share = DamagedShare(0.01, 500, "replaced")
    for number in range(40):
        pass_batch(share, [f"{number}.{i}" for i in range(5)])
    assert (share.count, share.read) == (200, 20_000)
    with pytest.raises(UserError) as caught:
        pass_batch(share, [f"more {i}" for i in range(6)])
    told = str(caught.value)
    assert told.startswith("206 of the 20500 images that were read are damaged, more than a share")
    assert "of 0.01, among them 0.0 (cut off)," in told and "and 196 more; restore" in told


def test_of_few_images_as_many_may_be_damaged_as_of_a_thousand() -> None:
    share = DamagedShare(0.01, 4, "replaced")
    for _ in range(5):
        pass_batch(share, ["a", "b"])
    with pytest.raises(UserError, match=r"11 of the 24 .* among them a \(cut off\), b"):
        pass_batch(share, ["a"])


def test_one_that_is_met_again_counts_again_and_is_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    share = DamagedShare(0.5, 4, "replaced by another one")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            pass_batch(share, ["a", "b"])
    assert share.count == 6
    assert [record.message for record in caplog.records] == [
        "damaged image replaced by another one: a (cut off)",
        "damaged image replaced by another one: b (cut off)",
    ]


def test_names_are_kept_of_the_first_thousand(caplog: pytest.LogCaptureFixture) -> None:
    share = DamagedShare(1, 1500, "replaced")
    with caplog.at_level(logging.WARNING):
        pass_batch(share, [str(number) for number in range(1500)])
    assert share.count == 1500 and len(share.found) == 1000
    assert len(caplog.records) == 1001
    assert caplog.records[-1].message.startswith("1000 damaged images were named")
