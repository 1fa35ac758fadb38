"""YAML of strangers: plain values, numbers as people mean them, and an end to everything."""

import time

import pytest

from zoo_common import yaml_text


def test_numbers_are_what_people_mean() -> None:
    assert yaml_text.parse("{a: 1e-4, b: 1., c: 1_000, d: 08, e: 'x'}") == {
        "a": 1e-4,
        "b": 1.0,
        "c": 1000,
        "d": "08",
        "e": "x",
    }
    assert yaml_text.parse("") is None


def test_an_alias_may_repeat_what_it_names() -> None:
    assert yaml_text.parse("a: &a [1, 2]\nb: *a\nc: {<<: {x: 1}, y: *a}") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"x": 1, "y": [1, 2]},
    }


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "'c' stands twice"),
        ("? [1]\n: 2", "unhashable key"),
        ("&a [*a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        (bomb(30), "stand for more than 200,000"),
        ("[" * 50_000, "nested too deeply"),
        ("!!timestamp 2001-99-99", "."),
        ("2001-13-45", "month"),
        ("!!int x", "invalid literal"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("a: *nobody", "undefined alias"),
        ("\0", "not allowed"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once_and_in_a_line(text: str, reason: str) -> None:
    begin = time.process_time()
    with pytest.raises(ValueError, match=reason) as caught:
        yaml_text.parse(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400
    assert time.process_time() - begin < 10


def test_many_keys_take_no_longer_than_they_must() -> None:
    text = "\n".join(f"key{number}: {number}" for number in range(20_000))
    begin = time.process_time()
    assert len(yaml_text.parse(text)) == 20_000
    assert time.process_time() - begin < 30
