"""The spine: losses with fixed keys, detections that do not depend on padding, gradients everywhere."""

from functools import partial

import pytest
import torch

from detector.model import parts
from detector.roi import DeformableRoIPool, RoIAlign, RoIPool
from detector.structures import Batch, Targets
from tests.tiny import random_batch, tiny_model

KEYS = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


def without_objects(targets: Targets) -> Targets:
    return targets._replace(valid=torch.zeros_like(targets.valid), has_mask=torch.zeros_like(targets.valid))


@pytest.mark.parametrize("roi", [RoIAlign, RoIPool, DeformableRoIPool, partial(DeformableRoIPool, modulated=True)])
def test_the_keys_of_the_losses_are_fixed_and_every_parameter_gets_a_gradient(roi):
    model = tiny_model(roi).train()
    offsets = {"loss_offset"} if roi not in (RoIAlign, RoIPool) else set()
    batch, targets = random_batch()
    one_empty = targets._replace(valid=targets.valid & torch.tensor([[True], [False]]))
    for case in (targets, one_empty, without_objects(targets)):
        model.zero_grad()
        losses = model(batch, case)
        assert set(losses) == KEYS | offsets
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_images_without_objects_teach_only_the_classifiers():
    batch, targets = random_batch()
    losses = tiny_model().train()(batch, without_objects(targets))
    assert losses["loss_rpn_box_reg"] == losses["loss_box_reg"] == losses["loss_mask"] == 0
    assert losses["loss_objectness"] > 0 and losses["loss_classifier"] > 0


def test_padding_of_the_ground_truth_changes_nothing():
    model = tiny_model().train()
    batch, targets = random_batch()
    more = Targets(*(torch.cat([t, torch.zeros_like(t)], dim=1) for t in targets[:7]))
    losses, padded = model(batch, targets), model(batch, more)
    for key in losses:
        torch.testing.assert_close(losses[key], padded[key])


def test_images_of_one_canvas_go_together():
    canvases = torch.tensor([[64, 96], [96, 64], [64, 96], [32, 32], [96, 64]])
    assert sorted(part.tolist() for part in parts(canvases, alone=False)) == [[0, 2], [1, 4], [3]]
    assert [part.tolist() for part in parts(canvases, alone=True)] == [[0], [1], [2], [3], [4]]


def test_an_image_is_detected_alike_alone_and_in_a_batch(monkeypatch):
    model = tiny_model(box_head={"score_threshold": 0.0, "detections_per_image": 20}).eval()
    batch, _ = random_batch(images=3)
    # The last image is smaller than the others; what lies outside it must not matter.
    batch.image_sizes[2] = torch.tensor([64, 96])
    batch.images[2, :, 64:] = 0
    batch.images[2, :, :, 96:] = 0
    with torch.no_grad():
        together = model(batch)
        for i, (height, width) in enumerate([(96, 128), (96, 128), (64, 96)]):
            alone = Batch(*(t[i : i + 1] for t in batch))
            alone = model(alone._replace(images=alone.images[:, :, :height, :width]))
            for field in ("boxes", "scores", "labels", "masks"):
                assert torch.equal(getattr(alone, field)[0], getattr(together, field)[i]), (i, field)
        # elsewhere than on the CPU images of one canvas go together: the same but for rounding
        monkeypatch.setattr("detector.model.parts", lambda canvases, alone: parts(canvases, alone=False))
        grouped = model(batch._replace(image_sizes=batch.image_sizes.roll(1, 0), images=batch.images.roll(1, 0)))
        for field in ("boxes", "scores", "masks"):
            expected = getattr(together, field).roll(1, 0)
            torch.testing.assert_close(getattr(grouped, field), expected, atol=1e-3, rtol=1e-3, msg=field)
    inside = together.boxes[2][together.valid[2]]
    assert (inside[:, 2] <= 96).all() and (inside[:, 3] <= 64).all()


def test_detections_are_sorted_padded_and_inside_the_image():
    model = tiny_model(box_head={"score_threshold": 0.2, "detections_per_image": 50}).eval()
    batch, _ = random_batch()
    with torch.no_grad():
        found = model(batch)
    assert found.boxes.shape == (2, 50, 4) and found.masks.shape == (2, 50, 28, 28)
    assert (found.scores.diff(dim=1) <= 0).all()
    assert (found.scores[~found.valid] == 0).all() and (found.labels[~found.valid] == 0).all()
    assert ((found.masks >= 0) & (found.masks <= 1)).all()


def test_nothing_found_gives_empty_detections():
    model = tiny_model(box_head={"score_threshold": 1.0}).eval()
    with torch.no_grad():
        found = model(random_batch()[0])
    assert not found.valid.any() and found.boxes.shape == (2, 100, 4) and found.masks.shape == (2, 100, 28, 28)


@pytest.mark.slow
def test_a_few_steps_bring_the_losses_down():
    model = tiny_model().train()
    batch, targets = random_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        losses = model(batch, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({key: float(value.detach()) for key, value in losses.items()})
    # loss_box_reg first grows with the number of RoIs that the RPN learns to put on objects.
    for key in ("loss_objectness", "loss_classifier", "loss_mask"):
        assert history[-1][key] < 0.3 * history[0][key], (key, history[0][key], history[-1][key])
    assert history[-1]["loss_box_reg"] < max(losses["loss_box_reg"] for losses in history)


def test_training_without_targets_says_so():
    with pytest.raises(ValueError, match=r"targets.*model\.eval"):
        tiny_model().train()(random_batch()[0])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"channel_order": "rbg"}, "rbg"),
        ({"rpn": {"negative_iou": 0.9}}, "negative_iou"),
        ({"rpn": {"nms_threshold": -1.0}}, "nms_threshold=-1.0"),
        ({"rpn": {"post_nms_top_n": (1000, 0)}}, "post_nms_top_n=0"),
        ({"box_head": {"positive_fraction": 1.5}}, "positive_fraction=1.5"),
        ({"box_head": {"detections_per_image": 0}}, "detections_per_image=0"),
    ],
)
def test_bad_settings_are_named(settings, word):
    with pytest.raises(ValueError, match=word):
        tiny_model(**settings)


def test_channel_order_and_normalisation():
    batch, _ = random_batch(images=1)
    batch.image_sizes[0] = torch.tensor([64, 96])
    rgb, bgr = tiny_model(), tiny_model(channel_order="bgr", pixel_mean=(103.53, 116.28, 123.675), pixel_std=(1, 1, 1))
    x, y = rgb.normalise(batch), bgr.normalise(batch)
    assert (x[:, :, 64:] == 0).all() and (x[:, :, :, 96:] == 0).all()
    pixel = batch.images[0, :, 3, 5].float()
    torch.testing.assert_close(x[0, 0, 3, 5], (pixel[0] - 123.675) / 58.395)
    torch.testing.assert_close(y[0, 0, 3, 5], pixel[2] - 103.53)


def test_stats_carry_the_offsets_of_each_head():
    model = tiny_model(DeformableRoIPool).train()
    batch, targets = random_batch()
    losses, stats = model(batch, targets, stats=True)
    assert stats["box_head/offsets"].shape[1:] == (2, 7, 7) and stats["mask_head/offsets"].shape[1:] == (2, 14, 14)
    assert stats["positives"] > 0
    torch.testing.assert_close(losses["loss_offset"], torch.tensor(0.0))  # offsets start at zero
