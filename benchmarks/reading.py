"""How much a reader of one training step has to read.

    python benchmarks/reading.py

Four steps of the quickstart's recipe run on a few small shapes; everything between the beginnings of the last two is
one step that has nothing to report: forward, backward, update, the record, the next batch from its files. Counted are
the files of detector/ that it enters, their lines, the lines of the functions entered, the ten files in which its story
reads, and the imports between the parts of detector/ that run back up (benchmarks/layout.py).
"""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType
from typing import Any

import hydra

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import harness
from benchmarks.layout import PACKAGE, imports_upwards
from detector.config import CONFIGS, check
from detector.engine.train import forward_backward, train

ROOT = PACKAGE.parent
STORY = ("engine/train", "model", "backbone/resnet", "backbone/necks", "rpn", "heads/box", "heads/mask")
STORY += ("roi/extractor", "roi/align", "ops/sampling")


def one_step(run: Callable[[], Any]) -> set[CodeType]:
    """The loop, and the code of detector/ that `run`, a training of four steps, enters in the third."""
    entered: set[CodeType] = set()
    begun = 0

    def note(frame, event: str, argument) -> None:
        nonlocal begun
        if event == "call":
            if frame.f_code is forward_backward.__code__:
                begun += 1
                entered.add(frame.f_back.f_code)  # the loop
            if begun == 3 and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                entered.add(frame.f_code)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered


def quickstart(folder: Path) -> None:
    """Four steps of its model and its loop; the images are small, few and loaded in this process."""
    script = [sys.executable, ROOT / "data" / "make_shapes.py", "--out", folder / "data"]
    sizes = ["--train", "8", "--val", "2", "--size", "96"]
    subprocess.run([*script, *sizes], check=True, stdout=subprocess.DEVNULL)
    overrides = ["experiment=quickstart", "schedule.max_iterations=4", "training.batch_size=2", "evaluation.every=null"]
    overrides += ["runtime.device=cpu", "runtime.workers=0", "runtime.tensorboard=false", "runtime.pictures_every=null"]
    overrides += ["runtime.checkpoint_every=4", f"data.root={folder / 'data'}", f"run_dir={folder / 'run'}"]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", overrides)
    check(cfg)
    train(cfg)


def length(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def lines_of(functions: Iterable[CodeType]) -> set[tuple[str, int]]:
    """(file, line) of all lines of the functions; one inside another counts once."""
    lines = set()
    for code in functions:
        text, first = inspect.getsourcelines(code)
        lines |= {(code.co_filename, first + i) for i in range(len(text))}
    return lines


def main() -> None:
    options = harness.parser(__doc__, repeats=1)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        entered = one_step(lambda: quickstart(Path(folder)))
    functions = [code for code in entered if code.co_name != "<module>"]
    files = sorted({Path(code.co_filename) for code in functions})
    story = {name: PACKAGE / f"{name}.py" for name in STORY}
    missing = [name for name, file in story.items() if not file.is_file()]
    upwards = imports_upwards()
    lines = lines_of(functions)
    rows = [["file", "lines", "of functions entered"]]
    for file in files:
        rows.append([str(file.relative_to(PACKAGE)), length(file), sum(name == str(file) for name, _ in lines)])
    figures = {
        "files": len(files),
        "lines_of_files": sum(map(length, files)),
        "lines_of_functions": len(lines),
        "lines_of_story": sum(length(file) for name, file in story.items() if name not in missing),
        "imports_upwards": len(upwards),
    }
    print(harness.table(rows[0], rows[1:]))
    print()
    print(harness.table(["one step", ""], [[name.replace("_", " "), value] for name, value in figures.items()]))
    if missing:
        print(f"not in the story, because there is no such file: {', '.join(missing)}")
    for (part, other), places in upwards.items():
        print(f"{part} imports {other}: {', '.join(places)}")
    harness.save(args.json, "cpu", setting={"recipe": "quickstart"}, reading=figures)


if __name__ == "__main__":
    main()
