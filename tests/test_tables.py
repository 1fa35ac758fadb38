"""tools/tables.py on a copy of the repository."""

import json
import subprocess
import sys
from pathlib import Path

TWINS = "contrib/cv/classification/Twins-ALTGVT-S"
RECORD = {
    "status": "completed",
    "run": "train_full_8p",
    "metric": {"name": "top1", "value": 78.5, "unit": "percent"},
    "throughput": {"images_per_sec": 2100.25},
    "epochs": 100.0,
    "precision": "O1 float16",
    "versions": {"torch": "2.14.0"},
    "device": "npu (Ascend910B2)",
    "world_size": 8,
    "data": "ImageNet2012",
}


def tables(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "tools" / "tables.py"), *words], capture_output=True, text=True
    )


def rows(file: Path, start: str) -> list[list[str]]:
    """The cells of the rows of a file's tables whose first cell starts so."""
    lines = file.read_text().splitlines()
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in lines
        if line.startswith(f"| {start}")
    ]


def test_check_tells_what_is_stale_and_writes_nothing(copy: Path) -> None:
    assert tables(copy).returncode == 0
    assert tables(copy, "--check").returncode == 0
    readme = copy / TWINS / "README.md"
    fresh = readme.read_text()
    stale = fresh.replace("<!-- options:begin -->\n", "<!-- options:begin -->\nold\n")
    readme.write_text(stale)
    told = tables(copy, "--check")
    assert told.returncode == 1
    assert f"stale: {TWINS}/README.md" in told.stdout
    assert readme.read_text() == stale
    assert tables(copy).returncode == 0
    assert readme.read_text() == fresh


def test_options_show_their_setting_and_the_value_of_the_first_run(copy: Path) -> None:
    tables(copy)
    readme = copy / TWINS / "README.md"
    (row,) = rows(readme, "`--batch_size`")
    assert row[1:3] == ["`data.batch_size`", "`128`"]
    (row,) = rows(readme, "`--weight-decay`")
    assert row[-1] == "this model"


def test_a_changed_config_makes_the_table_stale(copy: Path) -> None:
    tables(copy)
    config = copy / TWINS / "configs" / "alt_gvt_small.yaml"
    config.write_text(config.read_text().replace("batch_size: 128", "batch_size: 96"))
    assert tables(copy, "--check").returncode == 1


def test_published_numbers_stand_beside_ours_or_not_run(copy: Path) -> None:
    tables(copy)
    readme = copy / TWINS / "README.md"
    (row,) = rows(readme, "8p-NPU")
    assert row[2:4] == ["not run", "not run"]
    assert row[9:] == ["78.43", "2026.39", "100", "O1", "1.8"]
    assert "model card of Twins-ALTGVT-S in Ascend ModelZoo-PyTorch" in readme.read_text()

    results = copy / TWINS / "results"
    (results / "full.json").write_text(json.dumps(RECORD))
    published = results / "published.yaml"
    published.write_text(
        published.read_text().replace("{name: 8p-NPU,", "{name: 8p-NPU, record: full.json,")
    )
    assert tables(copy).returncode == 0
    (row,) = rows(readme, "8p-NPU")
    assert row[:7] == [
        "8p-NPU", "ImageNet2012", "top1 78.50 %", "2100.25", "100", "O1 float16", "2.14.0",
    ]  # fmt: skip
    assert row[7:10] == ["8 x npu (Ascend910B2)", "[full.json](results/full.json)", "78.43"]


def test_other_records_have_rows_and_the_index_names_them(copy: Path) -> None:
    record = RECORD | {"run": "train_other_1p", "device": "cpu", "world_size": 1, "data": "sample"}
    (copy / TWINS / "results" / "smoke.json").write_text(json.dumps(record))
    assert tables(copy).returncode == 0
    (row,) = rows(copy / TWINS / "README.md", "`train_other_1p`")
    assert row[1:3] == ["sample", "top1 78.50 %"]
    assert row[9:] == ["-"] * 5
    (row,) = rows(copy / "README.md", "[Twins-ALTGVT-S]")
    assert "`train_other_1p` top1 78.50 % (cpu)" in row[-1]
    assert "on NPUs not run" in row[-1]


def test_operators_come_from_the_record_of_npu_ops(copy: Path) -> None:
    readme = copy / TWINS / "README.md"
    assert tables(copy).returncode == 0
    newest = rows(readme, "2.")[-1]
    assert newest[0].endswith("2.14") and newest[1] == "yes" and newest[-1] == "none"

    file = copy / TWINS / "npu_operators.json"
    record = json.loads(file.read_text())
    record["versions"][-1]["fallbacks"] = ["torchvision::nms"]
    file.write_text(json.dumps(record))
    assert tables(copy, "--check").returncode == 1
    assert tables(copy).returncode == 0
    assert rows(readme, "2.")[-1][-1] == "`torchvision::nms`"

    file.unlink()
    assert tables(copy).returncode == 0
    assert "Not recorded: `python tools/npu_ops.py twins" in readme.read_text()
