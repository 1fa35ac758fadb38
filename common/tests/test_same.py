"""What must be equal on all machines: what is seen, what may differ, and what is said."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zoo_common import runs, same, sample
from zoo_common.preflight import Place

TOY = Path(__file__).with_name("toy")
RCNN = Path(__file__).parents[2] / "built-in/cv/detection/Faster_Mask_RCNN_for_PyTorch"


def facts(*words: str, model: Path = TOY, run: str = "train_1p", **where: Any) -> dict[str, Any]:
    loaded = runs.load(model)
    spec = loaded.run(run)
    config = loaded.config(spec, list(words))
    place = {"device": "cpu", "processes": 1, "nnodes": 2, "node_rank": 0} | where
    return same.facts(loaded, spec, config, Place(master_addr="h", master_port=1, **place))


def difference(mine: dict[str, Any], *others: dict[str, Any]) -> str | None:
    named = {f"machine {number}": each for number, each in enumerate(others, 1)}
    return same.first_difference(mine, named, "machine 0")


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--device_id=1", "run.threads=3", "run.id=x"], {}),
        (["--node_rank=1", "--local_addr=127.0.0.2"], {"node_rank": 1}),
        (["--master_addr=10.0.0.1", "--master_port=29500", "launch.join_timeout_s=3"], {}),
        (["--output_dir=/elsewhere", "--data_path=/another/disk"], {}),
    ],
)
def test_what_belongs_to_a_machine_may_differ(words: list[str], where: dict[str, Any]) -> None:
    theirs = json.loads(json.dumps(facts(*words, **where)))
    assert difference(facts(), theirs) is None


@pytest.mark.parametrize(
    ("words", "where", "said"),
    [
        (["--seed=3"], {}, "setting run.seed: machine 2 has 3, machine 0 has 0; start all"),
        (["--batch_size=8"], {}, "setting data.batch_size: machine 2 has 8, machine 0 has 4"),
        (["--nnodes=2:4"], {}, "setting launch.nnodes: machine 2 has 2:4, machine 0 has 1"),
        (["--resume"], {}, "setting run.resume: machine 2 has given, machine 0 has not given"),
        ([], {"processes": 4}, "place processes: machine 2 has 4, machine 0 has 1; start all"),
        ([], {"device": "npu"}, "place device: machine 2 has npu, machine 0 has cpu"),
    ],
)
def test_a_difference_names_item_and_machine(
    words: list[str], where: dict[str, Any], said: str
) -> None:
    message = difference(facts(), facts(), facts(*words, **where))
    assert message is not None
    assert message.startswith("The machines of this run differ in the ")
    assert said in message


def test_all_machines_that_differ_are_named() -> None:
    message = difference(facts(), facts("--seed=3"), facts(), facts("--seed=3"))
    assert message is not None
    assert "machine 1, machine 3 have 3, machine 0 has 0" in message


def test_another_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = facts()
    monkeypatch.setattr(same.importlib.metadata, "version", lambda name: "0.0+" + name)
    message = difference(mine, facts())
    assert message is not None
    assert "in the version of torch: machine 1 has 0.0+torch, machine 0 has" in message
    assert message.endswith("install the same versions on all machines.")


def test_another_state_of_the_code_names_the_file(tmp_path: Path) -> None:
    """A package is imported once, so that each machine is a process of its own."""
    code = (
        "import json, sys; from pathlib import Path; from zoo_common import runs, same;"
        "from zoo_common.preflight import Place; model = runs.load(Path.cwd());"
        "spec = model.run('train_1p');"
        "place = Place('cpu', 1, 2, 0, 'h', 1);"
        "print(json.dumps(same.facts(model, spec, model.config(spec, []), place)))"
    )
    found = []
    for machine in ("one", "two"):
        model = tmp_path / machine
        shutil.copytree(TOY, model, ignore=shutil.ignore_patterns("__pycache__", "output"))
        if machine == "two":
            file = model / "toy" / "train.py"
            file.write_text(file.read_text() + "# a line more\n")
            (model / "toy" / "more.py").touch()
        words = [sys.executable, "-c", code]
        found.append(json.loads(subprocess.run(words, cwd=model, stdout=-1, check=True).stdout))
    message = difference(*found)
    assert message is not None
    assert "in the code toy/train.py: machine 1 has " in message
    found[1]["code toy/train.py"] = found[0]["code toy/train.py"]
    message = difference(*found)
    assert message is not None
    assert "in the code toy/more.py: machine 1 has e3b0c44298fc, machine 0 has nothing;" in message


@pytest.mark.parametrize(
    ("file", "content", "item"),
    [
        ("annotations/instances_train2017.json", None, "data train_json: "),
        ("train2017/one more.jpg", b"x", "data train_images: machine 1 has 5 files"),
        ("annotations/instances_val2017.json", b"", "data val_json: machine 1 has 0 bytes"),
    ],
)
def test_another_coco_is_told(tmp_path: Path, file: str, content: bytes | None, item: str) -> None:
    root = tmp_path / "coco"
    sample.make_at(root, layout="coco", train=4, val=2)
    words = [f"--data_path={root}"]
    here = {"model": RCNN, "run": "train_smoke_1p"}
    mine = facts(*words, **here)
    assert difference(mine, facts(*words, **here)) is None
    changed = root / file
    if content is None:  # as many bytes, and other ones
        changed.write_bytes(changed.read_bytes().replace(b'"bbox"', b'"BBOX"', 1))
    else:
        changed.write_bytes(content)
    message = difference(mine, facts(*words, **here))
    assert message is not None
    assert item in message
    assert message.endswith("give each machine the same data set.")


def test_another_imagenet_is_told(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    sample.make_at(root, layout="imagenet", train=20, val=10)
    here = {"run": "train_sample_1p"}
    mine = facts(f"--data_path={root}", **here)
    picture = next((root / "train").glob("*/*"))
    other = next(path for path in (root / "train").iterdir() if path != picture.parent)
    picture.rename(other / "moved.png")  # as many pictures, in other classes
    message = difference(mine, facts(f"--data_path={root}", **here))
    assert message is not None
    assert "in the data train: machine 1 has 10 classes with 20 files (" in message
    shutil.rmtree(root / "val")
    message = difference(mine, facts(f"--data_path={root}", **here))
    assert message is not None


def test_another_yfcc_is_told(tmp_path: Path) -> None:
    root = tmp_path / "yfcc"
    sample.make_at(root, layout="yfcc", train=10, val=10)
    data = SimpleNamespace(path=str(root), val_path="")
    mine = same._data_set("yfcc", data)
    captions = root / "yfcc15m_clean_open_data.json"
    captions.write_bytes(captions.read_bytes().replace(b"a", b"b"))
    theirs = same._data_set("yfcc", data)
    assert {item for item in mine if mine[item] != theirs[item]} == {"data captions"}
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        (shards / f"{number:06d}.tar").write_bytes(b"0" * number)
    data = SimpleNamespace(path=f"{shards}/{{000000..000002}}.tar", val_path=str(root))
    mine = same._data_set("yfcc", data)
    assert mine["data shards"].startswith("3 shards of 3 bytes (")
    (shards / "000000.tar").write_bytes(b"0")
    assert same._data_set("yfcc", data)["data shards"].startswith("3 shards of 4 bytes (")


def test_a_large_file_is_known_by_parts_all_over_it(tmp_path: Path) -> None:
    file = tmp_path / "large"
    size = 20_000_000
    marks = set()
    for position in (None, 0, size - 1, size // 2):
        with file.open("wb") as stream:
            stream.truncate(size)
            if position is not None:
                stream.seek(position // (same._PART_BYTES * 2) * (same._PART_BYTES * 2))
                stream.write(b"\x01" * min(same._PART_BYTES * 3, size - stream.tell()))
        marks.add(same._mark(file))
    assert len(marks) == 4


def test_weights_are_known_by_their_content(tmp_path: Path) -> None:
    files = []
    for number in (1, 2):
        file = tmp_path / f"weights {number}.pth"
        file.write_bytes(b"x")
        files.append(file)
    one, two = (facts(f"--weights={file}") for file in files)
    assert difference(one, two) is None
    files[1].write_bytes(b"y")
    message = difference(one, facts(f"--weights={files[1]}"))
    assert message is not None
    assert "in the file of weights: machine 1 has 1 bytes (" in message
