"""What a pattern of shards stands for, and what is refused."""

import json
from pathlib import Path

import pytest

from zoo_common.errors import UserError
from zoo_common.shard_names import expand, is_pattern


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(12):
            (tmp_path / folder / f"{number:03d}.tar").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a/{000..002}.tar", ["a/000", "a/001", "a/002"]),
        ("a/0{08..11}.tar", ["a/008", "a/009", "a/010", "a/011"]),
        ("{a,b}/00{1..2}.tar", ["a/001", "a/002", "b/001", "b/002"]),
        ("{b,a}/{007,003}.tar", ["b/007", "b/003", "a/007", "a/003"]),
        ("*/00[01].tar", ["a/000", "a/001", "b/000", "b/001"]),
        ("{b,a}/01?.tar", ["b/010", "b/011", "a/010", "a/011"]),
        ("b/005.tar", ["b/005"]),
    ],
)
def test_patterns_mean_what_the_webdataset_library_reads(
    shards: Path, pattern: str, names: list[str]
) -> None:
    assert is_pattern(str(shards / pattern))
    assert expand(str(shards / pattern)) == [shards / f"{name}.tar" for name in names]


def test_brackets_in_a_path_that_exists_are_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "run[1]").mkdir()
    path = tmp_path / "run[1]" / "0.tar"
    path.touch()
    assert expand(str(path)) == [path]


def test_a_directory_means_the_shards_of_its_index(shards: Path) -> None:
    assert not is_pattern(str(shards / "a"))
    entries = [{"name": "003.tar"}, {"name": "001.tar"}]
    (shards / "a" / "shards.json").write_text(json.dumps({"shards": entries}))
    assert is_pattern(str(shards / "a"))
    assert expand(str(shards / "a")) == [shards / "a" / "003.tar", shards / "a" / "001.tar"]
    (shards / "a" / "001.tar").unlink()
    with pytest.raises(UserError, match=r"1 of the 2 shards .* are missing in .*\(001\.tar\)"):
        expand(str(shards / "a"))


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"shards": [{}]}', '{"shards": 3}', '{"shards": [{"name": "../b/001.tar"}]}'],
)
def test_an_index_that_is_none_is_told(shards: Path, content: str) -> None:
    (shards / "a" / "shards.json").write_text(content)
    with pytest.raises(UserError, match=r"shards\.json (is no index|names shards outside)"):
        expand(str(shards / "a"))


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("a/{000..015}.tar", r"4 of the 16 shards .*\(012\.tar, 013\.tar, 014\.tar, 015\.tar\)"),
        ("c/{000..099}.tar", r"100 of the 100 shards .*004\.tar, \.\.\.\)"),
        ("c/*.tar", "No shard is called"),
        ("a/{005..001}.tar", "cannot be read: write"),
        ("a/{000..004..2}.tar", "cannot be read: write"),
        ("a/{000..99999999999}.tar", "over 1,000,000 names"),
        ("{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar", "over 1,000,000 names"),
        ("a/{001,001}.tar", "name a file twice"),
    ],
)
def test_what_cannot_be_read_is_told(shards: Path, pattern: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        expand(str(shards / pattern))


@pytest.mark.parametrize(
    "address",
    ["pipe:cat {0}", "https://host/{{0..3}}.tar", "s3://bucket/0.tar", "{0}/a/000.tar::{0}/1.tar"],
)
def test_nothing_but_files_is_followed(shards: Path, address: str) -> None:
    given = address.format(shards)
    assert is_pattern(given)
    with pytest.raises(UserError, match="are no files of this machine"):
        expand(given)


def test_directories_and_words_are_no_patterns(shards: Path) -> None:
    assert not any(map(is_pattern, ["", "sample", str(shards), "data/coco", "~/nothing"]))
