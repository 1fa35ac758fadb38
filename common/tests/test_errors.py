"""What of a library's error goes into ours."""

import pytest

from zoo_common.errors import first_line, one_line


def test_a_long_error_keeps_its_start_and_its_end() -> None:
    words = one_line(ValueError(f"what it is {'x' * 60_000} what to do"), 100)
    assert len(words) == 100
    assert words.startswith("what it is xx") and words.endswith("xx what to do")
    assert " ... " in words


def test_an_error_is_one_line() -> None:
    error = ValueError("\n  mapping values\n    in line 3. \n")
    assert one_line(error) == "mapping values in line 3."
    assert first_line(error) == "mapping values"


@pytest.mark.parametrize("shorten", [one_line, first_line])
def test_an_error_without_words_is_its_type(shorten) -> None:
    assert shorten(MemoryError()) == "MemoryError"
