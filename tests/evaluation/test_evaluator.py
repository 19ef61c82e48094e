"""The evaluation loop with a model that knows the answers, alone and on two processes."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from detector.data import read_coco
from detector.evaluation import class_table, coco_metrics, evaluate, summary_table
from detector.evaluation.tables import class_csv
from detector.structures import Batch, Detections
from tests.evaluation.test_coco import random_case


class Oracle(nn.Module):
    """Returns the stored predictions of each image, in pixels of a network input of twice the size."""

    def __init__(self, truth, predictions, masks=True):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)  # a part that stays frozen in training
        self.labels = {c["id"]: i + 1 for i, c in enumerate(truth["categories"])}
        self.predictions, self.masks = predictions, masks

    def forward(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        rows = [[p for p in self.predictions if p["image_id"] == i] for i in batch.image_ids.tolist()]
        most = max(map(len, rows))
        boxes, scores = torch.zeros(len(rows), most, 4), torch.zeros(len(rows), most)
        labels = torch.zeros(len(rows), most, dtype=torch.int64)
        for n, row in enumerate(rows):
            for d, p in enumerate(row):
                x, y, w, h = p["bbox"]
                boxes[n, d] = torch.tensor([x, y, x + w, y + h]) * 2
                scores[n, d], labels[n, d] = p["score"], self.labels[p["category_id"]]
        masks = torch.ones(len(rows), most, 28, 28) if self.masks else None
        return Detections(boxes, scores, labels, labels > 0, masks)


class Dataset:
    """What the evaluation asks of a CocoDataset."""

    def __init__(self, truth, on_error="raise"):
        self.truth, self.annotations = truth, read_coco(truth, on_error=on_error)
        self.image_ids = [image["id"] for image in truth["images"]]
        self.category_ids = [c["id"] for c in truth["categories"]]

    def __len__(self):
        return len(self.image_ids)

    @property
    def rows(self):
        return np.flatnonzero(np.isin(self.annotations.image_ids, self.image_ids))

    def loader(self, images, batch_size=2):
        for start in range(0, len(images), batch_size):
            ids = torch.tensor(images[start : start + batch_size])
            sizes = torch.full((len(ids), 2), 160)
            yield Batch(torch.zeros(len(ids), 3, 320, 320, dtype=torch.uint8), sizes * 2, sizes, ids, ids), None


@pytest.fixture
def case():
    truth, predictions = random_case(3, images=7)
    return Dataset(truth), Oracle(truth, predictions)


def run(dataset, model, images=range(7), **options):
    return evaluate(model, dataset.loader(list(images)), dataset, "cpu", progress=False, **options)


def test_results_and_metrics_are_those_of_the_stored_predictions(case, tmp_path):
    dataset, model = case
    metrics, results = run(dataset, model, folder=tmp_path)
    boxes = [{k: v for k, v in p.items() if k != "segmentation"} for p in model.predictions]
    expected = coco_metrics(dataset.truth, boxes, per_class=True)
    assert metrics["per_class"]["bbox"] == expected.pop("per_class") and metrics["bbox"] == expected
    assert metrics["segm"] == coco_metrics(dataset.truth, results, "segm", "pycocotools")
    assert json.loads((tmp_path / "predictions.json").read_text()) == results
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_training_mode_comes_back_module_by_module(case):
    dataset, model = case
    model.train()
    model.norm.eval()
    run(dataset, model)
    assert model.training and not model.norm.training
    model.predictions = None
    with pytest.raises(TypeError):
        run(dataset, model)
    assert model.training and not model.norm.training


def test_no_detections_at_all(case):
    dataset, model = case
    model.predictions = []
    metrics, results = run(dataset, model)
    assert results == [] and metrics["bbox"]["AP"] == metrics["segm"]["AP"] == 0


def test_an_image_that_comes_twice_counts_once(case):
    dataset, model = case
    assert run(dataset, model, [0, 1, 2, 3, 4, 5, 6, 0, 1]) == run(dataset, model)


def test_missing_images(case):
    dataset, model = case
    with pytest.raises(ValueError, match=r"left out 2 of 7 images, ids \[2, 6\]"):
        run(dataset, model, [0, 1, 3, 4, 5])


def test_images_and_entries_that_the_data_set_left_out(case):
    dataset, model = case
    dataset.image_ids = [0, 1, 3, 4, 5]
    metrics, results = run(dataset, model, dataset.image_ids)
    kept = [a for a in dataset.truth["annotations"] if a["image_id"] in dataset.image_ids]
    images = [i for i in dataset.truth["images"] if i["id"] in dataset.image_ids]
    clean = dataset.truth | {"images": images, "annotations": kept}
    assert metrics["bbox"] == coco_metrics(clean, results) and {r["image_id"] for r in results} <= set(
        dataset.image_ids
    )
    bad = [
        {"bbox": [1, 2, "wide", 4]},
        {"category_id": 8},
        {"image_id": 99},
        {"segmentation": {"size": [1, 1], "counts": "1"}},
    ]
    truth = clean | {"annotations": [kept[0] | b for b in bad] + kept}
    with pytest.raises(ValueError, match=r"annotation \d+ bbox=\[1, 2, 'wide', 4\]"):
        Dataset(truth)
    dirty = Dataset(truth, on_error="skip")
    assert run(dirty, model, dirty.image_ids) == (metrics, results)


def test_masks_are_measured_over_the_objects_that_have_one(case, caplog):
    """What is found on an object without a mask is neither right nor wrong."""
    dataset, model = case
    assert set(run(dataset, Oracle(dataset.truth, model.predictions, masks=False))[0]) == {"bbox", "per_class"}
    perfect = [a | {"score": 0.5} for a in dataset.truth["annotations"] if not a["iscrowd"]]
    for entry in dataset.truth["annotations"]:  # the whole box, as the model's masks are
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    del next(a for a in dataset.truth["annotations"] if not a["iscrowd"])["segmentation"]
    metrics, results = run(Dataset(dataset.truth), Oracle(dataset.truth, perfect), per_class=False)
    assert metrics["segm"]["AR100"] == metrics["bbox"]["AR100"] > 0.99
    assert "segm is measured without 1 of" in caplog.text
    assert metrics["segm"] == coco_metrics(dataset.truth, results, "segm", "pycocotools")
    for entry in dataset.truth["annotations"]:
        entry.pop("segmentation", None)
    assert set(run(Dataset(dataset.truth), model, per_class=False)[0]) == {"bbox"}
    assert "segm is not measured" in caplog.text


def test_unknown_precision(case):
    with pytest.raises(ValueError, match="precision is 'half'; choose one of fp32, bf16, fp16"):
        run(*case, precision="half")


def test_what_is_not_measured_stays_open():
    """Keypoints have no APs and one AR."""
    row = summary_table({"keypoints": {"AP": 0.3, "AP50": 0.6, "AP75": 0.2, "APm": 0.4, "APl": -1.0, "AR": 0.5}})
    assert row.splitlines()[-1].split() == ["keypoint", "30.0", "60.0", "20.0", "-", "40.0", "-", "50.0"]


def test_tables(case):
    dataset, model = case
    metrics, _ = run(dataset, model)
    lines = summary_table(metrics).splitlines()
    assert lines[0].split() == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"]
    assert lines[2].split()[:2] == ["box", f"{100 * metrics['bbox']['AP']:.1f}"] and lines[3].startswith("mask")
    lines = class_table(metrics, dataset.truth).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + 3
    objects = [a for a in dataset.truth["annotations"] if a["category_id"] == 3 and not a["iscrowd"]]
    of_class = metrics["per_class"]
    (row,) = [line.split() for line in lines if line.startswith("class 0")]
    assert row[2:5] == [
        str(len({a["image_id"] for a in objects})),
        str(len(objects)),
        f"{100 * of_class['bbox']['class 0']['AP']:.1f}",
    ]
    quality = [of_class["segm"][" ".join(line.split()[:2])]["AP"] for line in lines[2:]]
    assert quality == sorted(quality, reverse=True)
    short = class_table(metrics, dataset.truth, 2).splitlines()
    assert short[:3] + short[4:] == lines[:3] + lines[4:]
    assert short[3] == "... 1 classes in between; all are in classes.csv"


def test_the_table_of_classes_as_csv(case):
    dataset, model = case
    metrics, _ = run(dataset, model)
    point = {"threshold": [0.4, 0.3, 0.5], "f1": [0.9, 0.8, 1.0], "precision": [0.9, 0.8, 1.0], "recall": None}
    points = {name: point for name in metrics["per_class"]["bbox"]}
    rows = list(csv.DictReader(io.StringIO(class_csv(metrics, dataset.truth, points))))
    assert len(rows) == 3 and rows[0]["threshold_low"] == "0.3" and rows[0]["recall"] == ""
    for row in rows:
        for kind, numbers in metrics["per_class"].items():
            for key, value in numbers[row["class"]].items():
                assert row[f"{kind}_{key}"] == ("" if value < 0 else str(value))


def worker(rank, init, folder, fail):
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    truth, predictions = random_case(3, images=7)
    dataset = Dataset(truth)
    # padded as a sampler does: 7 images on 2 ranks, the last of which is the first again
    images = [[0, 2, 4, 6], [1, 3, 5, 0]][rank] if not fail else [[0], [1]][rank]
    try:
        metrics, results = run(dataset, Oracle(truth, predictions), images)
        (folder / f"{rank}.json").write_text(json.dumps([metrics, results]))
    except ValueError as error:
        (folder / f"{rank}.json").write_text(json.dumps(str(error)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("fail", [False, True])
def test_two_processes_give_the_numbers_of_one(case, tmp_path, fail):
    mp.spawn(worker, (f"file://{tmp_path}/rendezvous", tmp_path, fail), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    if fail:  # both ranks end with the reason
        assert first == second == "the loader left out 5 of 7 images, ids [2, 3, 4, 5, 6] among them"
    else:
        assert first == json.loads(json.dumps(run(*case)))
        assert second == [first[0], []]
