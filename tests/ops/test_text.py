"""No name, and no terminal, ends a command."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout

import pytest
from PIL import Image

from detector import checkpoint as checkpoints
from detector.commands import evaluate, predict, validate
from detector.comparison.report import md_table
from detector.data import convert
from detector.evaluation.tables import table
from detector.ops.text import one_line, readable_streams, width

NAMES = ["a\nb\r\x00\x1b[31m", "猫 <b>&amp;|", "", "מרחבא \u202e", "👩‍🚀 " + "x" * 200]  # of five classes


@pytest.fixture(params=["ascii", "cp1252", "utf-8"])
def terminal(request):
    """For stdout: of some encoding, and it raises where that lacks a letter, as Python's does."""
    return io.TextIOWrapper(io.BytesIO(), request.param, "strict", write_through=True)


def shown(terminal: io.TextIOWrapper) -> str:
    return terminal.buffer.getvalue().decode(terminal.encoding)


def test_a_terminal_writes_what_it_lacks_in_plain_letters(terminal):
    with redirect_stdout(terminal):
        readable_streams()
        print("AP +1.0 ± 0.5 − × ≥ 猫 ─")
    expected = {
        "ascii": "AP +1.0 +- 0.5 - x >= \\u732b -\n",
        "cp1252": "AP +1.0 ± 0.5 - × >= \\u732b -\n",
        "utf-8": "AP +1.0 ± 0.5 − × ≥ 猫 ─\n",
    }
    assert shown(terminal) == expected[terminal.encoding]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a\nb\tc\x00\x1b", "a\\nb\\tc\\x00\\x1b"),
        ("", "''"),
        ("  ", "'  '"),
        ("猫 é\u00a0x", "猫 é\u00a0x"),
        ("a\u202eb\u2028", "a\\u202eb\\u2028"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("\ud800", "\\ud800"),
    ],
)
def test_one_line(name, expected):
    assert one_line(name) == expected


def test_tables_keep_their_columns():
    lines = table(["class", "AP"], [["猫", "1.0"], ["e\u0301", "20.0"]]).split("\n")
    assert len({width(line) for line in lines}) == 1
    assert md_table(["a"], [["x|<b>\ny"]])[2] == "| x\\|&lt;b>\\ny |"


@pytest.fixture
def nasty(state, shapes_tiny, tmp_path):
    """A data set whose classes have nasty names, and a checkpoint for it: (root, checkpoint)."""
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).symlink_to(shapes_tiny / split)
        name = f"annotations/instances_{split}.json"
        content = json.loads((shapes_tiny / name).read_text(encoding="utf-8"))
        names = dict(zip(state["categories"], NAMES))
        content["categories"] = [c | {"name": names[c["name"]]} for c in content["categories"]]
        (root / name).write_text(json.dumps(content), encoding="utf-8")
    checkpoints.save(state | {"categories": NAMES}, tmp_path / "run.pt")
    return root, tmp_path / "run.pt"


def start(main, terminal, monkeypatch, *arguments) -> int | None:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with redirect_stdout(terminal):
        try:
            main()
        except SystemExit as end:
            return end.code


@pytest.mark.slow
def test_commands_on_nasty_names(terminal, nasty, tmp_path, monkeypatch):
    """Evaluation, prediction with pictures, and validation, each to its end."""
    root, checkpoint = nasty
    options = [f"checkpoint={checkpoint}", "device=cpu", f"output={tmp_path / 'out'}"]
    assert not start(evaluate.main, terminal, monkeypatch, *options, f"data.root={root}", "workers=0")
    assert "a\\nb\\r\\x00\\x1b[31m" in shown(terminal)
    written = (tmp_path / "out" / "table.txt").read_text(encoding="utf-8")
    assert "猫 <b>&amp;|" in written and "''  " in written
    picture = min((root / "val").iterdir())
    assert not start(predict.main, terminal, monkeypatch, *options, f"images={picture}", "threshold=0")
    with Image.open(tmp_path / "out" / f"{picture.name}.png") as drawn:
        assert min(drawn.size) >= 800
    validation = ["experiment=none", f"data.root={root}", "--no-images", "--output", str(tmp_path / "report")]
    start(validate.main, terminal, monkeypatch, *validation)
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "猫 &lt;b&gt;&amp;amp;|" in page and "<b>" not in page.split("</style>")[1]


def test_converters_print_any_name(terminal, tmp_path):
    root = tmp_path / "猫"
    for kind in ("images", "labels"):
        (root / kind / "train").mkdir(parents=True)
    (root / "data.yaml").write_text("names: [猫]\ntrain: images/train\nval: images/train\n", encoding="utf-8")
    Image.new("RGB", (8, 8)).save(root / "images" / "train" / "é.png")
    (root / "labels" / "train" / "é.txt").write_text("0 0.5 0.5 0.5 0.5\n", encoding="utf-8")
    with redirect_stdout(terminal):
        assert convert.main(["yolo", str(root)]) == 0
    assert "1 images" in shown(terminal)
