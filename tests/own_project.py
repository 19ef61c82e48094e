"""The example project from nothing to its report, for test_package.py: in an environment and a folder of its own.

All in one process, so that the import of torch is paid for once. What messages advise is done to the letter.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

import detector
from detector.commands.main import main

RUN = Path("runs/shifted")
TRAIN = [  # the example's experiment in small, as tests.tiny has it
    "train",
    "--config-dir",
    "configs",
    "experiment=shifted_shapes",
    "model=faster_rcnn",
    "model.backbone.depth=10",
    "model.backbone.width=8",
    "model.neck.out_channels=16",
    "model.rpn.post_nms_top_n=[60,60]",
    "model.box_head.trunk.fc_channels=[32]",
    "training.batch_size=4",
    "evaluation.every=null",
    "runtime.device=cpu",
    "runtime.threads=1",
    "runtime.workers=0",
    "runtime.tensorboard=false",
]


def call(*arguments: str, code: int = 0) -> str:
    """Everything that `detector ...` prints; it must end with this exit code."""
    HydraConfig.instance().cfg = None  # as in a new process
    sys.argv = ["detector", *map(str, arguments)]
    out = io.StringIO()
    handler = logging.StreamHandler(out)  # in a process of its own a program would find no handler
    logging.getLogger("detector").addHandler(handler)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            ended = main() or 0
        except SystemExit as end:
            ended = end.code
        finally:
            logging.getLogger("detector").removeHandler(handler)
    assert ended == code, f"{arguments}: exit code {ended}\n{out.getvalue()}"
    return out.getvalue()


def with_trust(*arguments: str) -> None:
    """Refused before anything of the project is imported, with what to add; that is added, and it works."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_roi"]:
        del sys.modules[name]
    text = call(*arguments, code=2)
    assert "own_roi.ShiftedRoIAlign" in text and "own_roi" not in sys.modules, text
    if arguments[0] == "export":
        call(*arguments, *re.search(r"\((--trust \w+) for `detector export`\)", text)[1].split())
    else:
        call(*arguments, re.search(r"say so: (trust=\w+) on the command line", text)[1])
    assert "own_roi" in sys.modules


def story() -> None:
    assert detector.__file__.startswith(sys.prefix), detector.__file__
    make = re.search("make it with: detector (.*)", call(*TRAIN, f"run_dir={RUN}", code=2))[1]
    call(*make.split(), "--train", "8", "--val", "4", "--size", "96")
    text = call(*TRAIN, f"run_dir={RUN}", "schedule.max_iterations=2")
    advice = re.search(r"detector (predict checkpoint=.*) images=PATH (trust=own_roi)$", text, re.MULTILINE)
    checkpoint, image = f"checkpoint={RUN / 'last.pt'}", "data/shapes/val/000000.jpg"
    call(*advice[1].split(), f"images={image}", advice[2], "device=cpu", "output=as_advised")

    with_trust("eval", checkpoint, "device=cpu", "workers=0")
    with_trust("predict", checkpoint, "images=data/shapes/val", "device=cpu", "threshold=0", "draw=false")
    with_trust("explore", checkpoint, f"image={image}", "device=cpu")
    with_trust("export", RUN / "last.pt", "detector.pt2", "--size", "96", "96")
    call("export", RUN / "last.pt", "detector.safetensors")
    try:
        detector.load(RUN / "last.pt")
        raise AssertionError("loaded what nobody trusts")
    except ValueError as error:
        module = re.search(r'trust="(\w+)" in detector.load', str(error))[1]
    for file in (RUN / "last.pt", "detector.safetensors"):
        detector.load(file, trust=module).predict(image)

    text = call(*TRAIN, f"run_dir={RUN}", "schedule.max_iterations=3")
    assert f"continuing in {RUN} after iteration 2" in text, text
    call(*TRAIN, "schedule.max_iterations=3", "roi=align", "run_dir=runs/align")
    settings = ["runs=runs/*", "samples=5", "boundary=false", "probe_images=1", "pictures=1", "device=cpu", "workers=0"]
    text = call("compare", *settings)
    assert "own_roi.ShiftedRoIAlign" in text and "cost and alignment are not measured" in text, text
    text = call("compare", *settings, re.search(r"say so: (trust=\w+)", text)[1])
    assert "not measured" not in text and "left out" not in text, text
    call("validate", "experiment=shifted_shapes", "--config-dir", "configs", "--no-images")


if __name__ == "__main__":
    story()
