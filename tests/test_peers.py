"""benchmarks/peers.py: mmdetection has our weights and computes the same; who asks for it learns how to install it."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import inference, train_step
from benchmarks.peers import MMDetection, mask_rcnn_pair, mmdetection_data, mmdetection_state, synthetic_batch
from detector.evaluation.results import detections_to_coco
from detector.weights import load_foreign
from tests.test_parity_torchvision import EVERYTHING
from tests.weights.test_layouts import read_layout


@pytest.mark.parametrize(
    ("program", "arguments"),
    [(train_step, ("--contenders", "ours", "mmdetection_fp32")), (inference, ("--mmdetection",))],
)
def test_without_mmdetection_the_benchmarks_say_how_to_install_it(program, arguments, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv", None)
    message, *_ = call(program.main, *arguments)
    assert "pip install onedl-mmdetection" in message and "mmcv" in message and "\n" not in message


def test_mmdetection_takes_no_autocast(call, monkeypatch):
    monkeypatch.setattr(train_step, "require_mmdetection", lambda: None)
    code, _, error = call(train_step.main, "--dtype", "bf16", "--contenders", "ours", "mmdetection")
    assert code and "take mmdetection_fp32" in error


def test_our_weights_by_mmdetections_keys(shared):
    """All of its keys but for counters of batches have a tensor, and the import of weights gives ours back."""
    shapes = read_layout(shared, "mmdet-mask-rcnn_r50_fpn_1x_coco")["state_dict"]
    theirs = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    ours = mask_rcnn_pair("cpu", (64, 64))[0].state_dict()
    state = mmdetection_state(ours, theirs)
    assert set(state) == {key for key in theirs if "num_batches_tracked" not in key}
    assert all(value.shape == theirs[key].shape for key, value in state.items())
    back = load_foreign(state, "mmdet").state_dict
    assert set(back) == set(ours)
    assert all(torch.equal(back[name].reshape(value.shape), value) for name, value in ours.items())


@pytest.fixture
def mmdetection():
    pytest.importorskip("mmcv.ops", reason="mmdetection is not installed", exc_type=ImportError)


@pytest.mark.slow
def test_losses_equal_mmdetections(mmdetection):
    """Both draw all candidates: then the samples are the same whatever the order of the draw."""
    ours, _ = mask_rcnn_pair("cpu", (192, 256), settings="mmdet")
    data = synthetic_batch(2, (192, 256), 4, "cpu")
    theirs = MMDetection(ours)
    for sampler in (theirs.detector.rpn_head.sampler, theirs.detector.roi_head.bbox_sampler):
        sampler.num, sampler.pos_fraction = EVERYTHING, 1.0
    for stage in (ours.rpn, ours.box_head):
        stage.batch_size_per_image, stage.positive_fraction = EVERYTHING, 1.0
    losses, expected = ours.train()(data.batch, data.targets), theirs.train()(mmdetection_data(data))
    names = {
        "loss_objectness": "loss_rpn_cls",
        "loss_rpn_box_reg": "loss_rpn_bbox",
        "loss_classifier": "loss_cls",
        "loss_box_reg": "loss_bbox",
        "loss_mask": "loss_mask",  # of masks at 112 x 112 here and at the image's size there
    }
    assert set(losses) == set(names) and set(expected) == set(names.values())
    for name, theirs_name in names.items():
        rtol = 1e-3 if name == "loss_mask" else 1e-5
        assert losses[name].item() == pytest.approx(expected[theirs_name].item(), rel=rtol), name


@pytest.mark.slow
def test_detections_equal_mmdetections(mmdetection):
    size = (128, 160)
    ours, _ = mask_rcnn_pair("cpu", size, confident=True, settings="mmdet")
    data = synthetic_batch(2, size, 4, "cpu")
    theirs = MMDetection(ours).eval()
    with torch.inference_mode():
        found = detections_to_coco(ours.eval()(data.batch), data.batch, inference.CATEGORIES)
        expected = inference.encode(theirs(mmdetection_data(data)))
    same = inference.difference(found, expected)
    assert same["detections"] > 10 and same["box_px"] < 0.1 and same["score"] < 1e-3 and same["mask_iou"] > 0.98
