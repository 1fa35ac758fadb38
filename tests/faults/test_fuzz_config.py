"""Settings that anybody may hand in: YAML files, ``runs.yaml``, and words of a command line."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import amounts, feed, odd_values, spoiled, spoiled_tree, watched
from hypothesis import strategies as st

from zoo_common import runs
from zoo_common.config import fields_of, load_config, options_of, to_yaml
from zoo_common.errors import UserError

PACKAGES = ["twins", "rcnn", "solov2", "declip", "glip"]

WORDS = [
    b"!!python/object/apply:os.system ['touch ran']\n",
    b"!!python/name:os.system ",
    b"!!python/object/new:subprocess.Popen [[true]]\n",
    b"!!timestamp 2001-99-99", b"!!binary =", b"!!int x", b"!!float x", b"!!set {a, b}",
    b"!!omap [a: 1]", b"!!pairs [a: 1]", b"2001-13-45", b"1:99:99", b"0x", b"0b2",
    b"0x" + b"f" * 5000,
    b"? [a, b]\n: 1\n",
    b"&a [*a]", b"&a {x: *a}", b"<<: *a", b"<<: [1]", b"*nobody", b"_base_: ", b"_BASE_: [a]\n",
    b"_base_: config.yaml\n", b"${oc.env:HOME}", b"${a.b", b"---\n", b"...\n", b"%YAML 9.9\n",
    b"\t",
    b"| \n  a\n", b"> \n", b"'", b'"', b"{", b"[", b"}", b"]", b": ", b"- ", b"#", b"\xc2\x85",
    b"\xe2\x80\xa8", b"\xef\xbf\xbe", b"{a: " * 2000, b"- " * 5000,
]  # fmt: skip


def bomb() -> bytes:
    """A few hundred bytes that stand for a billion values."""
    lines = ["a0: &a0 {x: 1, y: 2, z: 3}"]
    lines += [
        f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}, r: *a{n - 1}, s: *a{n - 1}}}"
        for n in range(1, 20)
    ]
    return "\n".join(lines).encode()


def list_bomb() -> bytes:
    lines = ["a0: &a0 [x, y, z]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 20)]
    return "\n".join([*lines, "data: {min_sizes: *a19}", "run: {device: *a19}"]).encode()


@amounts
@pytest.mark.parametrize("package", PACKAGES)
def test_configs(package: str, amount: int, tmp_path: Path) -> None:
    config = importlib.import_module(f"{package}.config")
    path = tmp_path / "config.yaml"
    written = to_yaml(config.Config())
    directory = Path(config.__file__).parents[1] / "configs"
    valid = [written.encode(), *(file.read_bytes() for file in sorted(directory.glob("*.yaml")))]
    for file in directory.glob("*.yaml"):  # that some build on
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tree = yaml.safe_load(written)

    def read_config(data: bytes) -> None:
        path.write_bytes(data)
        to_yaml(load_config(config.Config, [f"--config={path}"], config.CARD_OPTIONS))

    read_config.__qualname__ += package
    for data in valid:
        read_config(data)
    trees = spoiled_tree([tree, {"run": tree["run"]}, {"data": tree["data"]}]).map(dumped)
    inputs = st.one_of(trees, spoiled(valid, [*WORDS, bomb(), list_bomb()]))
    feed(read_config, inputs, amount // len(PACKAGES), tmp_path)


def dumped(tree: Any) -> bytes:
    """YAML of a tree, or JSON's words where YAML's writer has none."""
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


@amounts
@pytest.mark.parametrize("package", PACKAGES)
def test_command_lines(package: str, amount: int, tmp_path: Path) -> None:
    config = importlib.import_module(f"{package}.config")
    names = [option.name for option in options_of(config.Config, config.CARD_OPTIONS)]
    names += [field.path for field in fields_of(config.Config)]
    names += ["--config", "--help", "--", "-", "run", "run.", ".", "=", "SOLVER.", "--no-such"]
    values = st.one_of(
        odd_values.map(str),
        st.sampled_from([
            "1,2", "[1,2]", "(1, 2)", "[[1,2],[3]]", "[1", "{a: 1}", "[&a [*a]]", "1e3", "true", "",
            "[!!python/name:os.system x]", "__import__('os').system('touch ran')", "9" * 5000,
            "(" * 300, "[" * 3000, "$(touch ran)", "`touch ran`", "; touch ran", "a b", "-1", "--",
        ]),
    )  # fmt: skip
    word = st.one_of(
        st.builds("{}={}".format, st.sampled_from(names), values),
        st.sampled_from(names),
        values,
    )

    def read_words(words: list[str]) -> None:
        to_yaml(load_config(config.Config, words, config.CARD_OPTIONS))

    read_words.__qualname__ += package
    feed(read_words, st.lists(word, min_size=1, max_size=4), amount // len(PACKAGES), tmp_path)


@amounts
def test_runs_files(amount: int, tmp_path: Path) -> None:
    toy = Path(__file__).parents[2] / "common" / "tests" / "toy"
    text = (toy / "test" / "runs.yaml").read_bytes()
    (tmp_path / "test").mkdir()
    for name in ("toy", "toy.yaml"):
        (tmp_path / name).symlink_to(toy / name)
    path = tmp_path / "test" / "runs.yaml"

    def read_runs(data: bytes) -> None:
        path.write_bytes(data)
        model = runs.load(tmp_path)
        for spec in model.runs.values():
            model.config(spec, [])

    read_runs(text)
    trees = spoiled_tree([yaml.safe_load(text)]).map(dumped)
    feed(read_runs, st.one_of(trees, spoiled([text], [*WORDS, bomb()])), amount, tmp_path)


@amounts
def test_texts_stay_as_they_are(amount: int, tmp_path: Path) -> None:
    """Also those that OmegaConf would fill in, with environment variables for example."""
    from twins.config import CARD_OPTIONS, Config

    file = tmp_path / "config.yaml"
    pieces = [
        "${",
        "}",
        "$",
        "{",
        "\\",
        "'",
        '"',
        "oc.env:HOME",
        "a",
        " ",
        "\n",
        "#",
        ": ",
        "é",
        "\t",
    ]
    texts = st.lists(st.sampled_from(pieces), max_size=8).map("".join)

    def read_text(text: str) -> None:
        config = load_config(Config, [f"run.id={text}"], CARD_OPTIONS)
        assert config.run.id == text
        file.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(Config, [f"--config={file}"], CARD_OPTIONS).run.id == text

    feed(read_text, texts, amount // 5, tmp_path, all_read=True)


@pytest.mark.parametrize("word", WORDS[:3])
def test_yaml_that_would_run_code_is_refused_and_not_run(word: bytes, tmp_path: Path) -> None:
    """That yaml's own loader would run it is what makes this test mean something."""
    from twins.config import CARD_OPTIONS, Config

    path = tmp_path / "config.yaml"
    path.write_bytes(b"run: " + word)
    with watched(tmp_path), pytest.raises(UserError, match="not valid YAML"):
        load_config(Config, [f"--config={path}"], CARD_OPTIONS)
    assert yaml.unsafe_load(path.read_bytes() if word is WORDS[1] else b"1") is not None
