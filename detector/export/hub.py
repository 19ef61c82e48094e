"""A trained detector in a repository of the Hugging Face hub: safetensors, its config, and a model card.

detector export runs/quickstart/best.pt hf://owner/repo          needs a token: `hf auth login`, or HF_TOKEN
detector.load("hf://owner/repo")                                 reads it, running nothing of what it holds
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from detector.checkpoint import save_safetensors
from detector.comparison.run_report import SAMPLES, quantiles
from detector.comparison.runs import read_run, validation_truth
from detector.comparison.statistics import draws, metrics
from detector.comparison.summary import measure
from detector.data import read_image
from detector.inference.load import load, read
from detector.inference.predict import Detector
from detector.ops.text import few
from detector.weights.downloads import HUB, hub

WEIGHTS, CONFIG, CARD, PICTURE = "model.safetensors", "config.yaml", "README.md", "detections.jpg"
KINDS = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP"}
COLUMNS = ("AP", "AP50", "AP75")


def push(checkpoint: str | Path, address: str, trust: str | Sequence[str] | None = ()) -> str:
    """Upload a checkpoint to hf://owner/repo[@branch], which is made if need be; returns the address of the commit.

    Raises ValueError for another address, without huggingface_hub, and for what the hub answers; ConfigError for a
    checkpoint that cannot be read.
    """
    found = HUB.fullmatch(address)
    if found is None or found[2]:
        raise ValueError(f"{address!r}: expected hf://owner/repository[@branch]")
    library = hub(address)
    repo, _, branch = found.groups()
    with tempfile.TemporaryDirectory() as folder:
        write(checkpoint, Path(folder), repo, trust)
        api = library.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        try:
            api.create_repo(repo, exist_ok=True)
            if branch:
                api.create_branch(repo, branch=branch, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=branch, commit_message="Upload a detector"
            )
        except (OSError, ValueError) as error:  # all of the library's
            raise ValueError(f"{address}: {' '.join(str(error).split())[:300]}") from error
    return str(done.commit_url)


def write(checkpoint: str | Path, folder: Path, repo: str, trust: str | Sequence[str] | None = ()) -> None:
    """Put what is uploaded into a folder."""
    state = read(checkpoint)
    detector = load(checkpoint, trust=trust)
    save_safetensors(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(yaml.safe_dump(state["config"], sort_keys=False), encoding="utf-8")
    run = Path(checkpoint).parent
    intervals, photo = of_run(run, Path(checkpoint).stem)
    if photo is not None:
        detector.predict(read_image(photo)).draw().save(folder / PICTURE, quality=90)
    card = card_of(repo, detector, state, intervals, photo is not None)
    (folder / CARD).write_text(card, encoding="utf-8")


def of_run(folder: Path, name: str) -> tuple[dict[str, list[float] | None], Path | None]:
    """The 95 % interval of each kind's AP, and the first picture of the validation set: as far as the run's folder and
    its data are still there."""
    try:
        run = read_run(folder, name)
        truth = validation_truth(run)
        kinds = [
            kind for kind in ("bbox", "segm") if kind == "bbox" or any("segmentation" in p for p in run.predictions)
        ]
        weights = draws(len(truth), SAMPLES)
        intervals = {k: quantiles(metrics(measure(run, truth, k, weights, run.limits)["drawn"])["AP"]) for k in kinds}
    except ValueError:  # no finished run, or its data are gone: the card goes without
        return {}, None
    with contextlib.suppress(OSError, ValueError):  # of a server, or shards
        names = (images / file for images in run.images for file in truth.all_file_names()[:1])
        return intervals, next((path for path in names if path.is_file()), None)
    return intervals, None


def card_of(
    repo: str, detector: Detector, state: Mapping[str, Any], intervals: Mapping[str, Any], picture: bool
) -> str:
    """The text of README.md: metadata that the hub reads, and what people want to know."""
    config, measured = state["config"], state.get("metrics") or {}
    data = config.get("data") or {}
    kinds = [kind for kind in KINDS if "AP" in (measured.get(kind) or {})]
    name, task = repo.partition("/")[2], "image-segmentation" if "segm" in kinds else "object-detection"
    head: dict[str, Any] = {
        "library_name": "two-stage-detector",
        "pipeline_tag": task,
        "tags": ["object-detection", "two-stage-detector"],
    }
    source = Path(str(data.get("root", ""))).name or "unknown"
    if kinds:
        numbers = [{"type": KINDS[k], "value": round(float(measured[k]["AP"]), 4)} for k in kinds]
        result = {"task": {"type": task}, "dataset": {"type": source, "name": source}, "metrics": numbers}
        head["model-index"] = [{"name": name, "results": [result]}]
    parts = [type(part).__name__ for part in detector.model.children()]
    text = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n", f"# {name}\n"]
    if picture:
        text.append(f"![detections in a picture of the validation set]({PICTURE})\n")
    text.append(f"{', '.join(parts)}; {sum(p.numel() for p in detector.model.parameters()) / 1e6:.1f} M parameters.\n")
    text.append("```python\nimport detector\n")
    text.append(f'model = detector.load("hf://{repo}")\nmodel.predict("photo.jpg")\n```\n')
    text.append(f"## Categories\n\n{few(list(detector.categories), 100)}\n")
    text.append(f"## Data\n\n{source}{trained_on(state)}\n")
    if kinds:
        text.append(f"## Results\n\nOn the validation set, in percent, after {state.get('iteration', 0)} iterations.\n")
        rows = ["| | AP | 95 % interval | AP50 | AP75 |", "|---|---|---|---|---|"]
        for kind in kinds:
            ap, *others = (f"{100 * float(measured[kind][column]):.1f}" for column in COLUMNS)
            ends = intervals.get(kind)
            known = f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}" if ends else "not measured"
            rows.append(f"| {KINDS[kind].removesuffix(' AP')} | {ap} | {known} | {' | '.join(others)} |")
        text.append("\n".join(rows) + "\n")
    return "\n".join(text)


def trained_on(state: Mapping[str, Any]) -> str:
    """': 1500 training images, 250 validation images', if the checkpoint tells."""
    contents = state.get("contents") or {}
    names = {"train": "training", "val": "validation"}
    told = [f"{len(contents[key]['sizes'])} {name} images" for key, name in names.items() if key in contents]
    return f": {', '.join(told)}" if told else ""
