"""Test-time augmentation: one plain view changes nothing, views agree on where things are."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from detector.heads import ConvTrunk, KeypointHead
from detector.heads.keypoint import KeypointPrediction
from detector.inference.tta import Augmented, View, from_view, to_view, view_of
from detector.roi import RoIAlign
from detector.structures import Batch
from tests.tiny import random_batch, tiny_model

SWAP = [0, 2, 1]  # nose, left eye, right eye


def model(**settings):
    return tiny_model(box_head={"score_threshold": 0.0, "detections_per_image": 10}, **settings).eval()


def keypoint_model():
    trunk = partial(ConvTrunk, conv_channels=[16])
    return model(mask=False, keypoint_head=partial(KeypointHead, roi=RoIAlign, num_keypoints=3, trunk=trunk))


@torch.no_grad()
@pytest.mark.parametrize("make", [model, keypoint_model])
def test_one_plain_view_is_the_model_itself(make):
    batch, _ = random_batch()
    for found, expected in zip(Augmented(make(), flip=False)(batch), make()(batch)):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_mirrored_image_has_mirrored_detections():
    batch, _ = random_batch()
    augmented = Augmented(model(), scales=[1.0, 1.5])
    mirrored = view_of(batch, View(1.0, True))
    found, reflected = augmented(batch), augmented(mirrored)
    boxes = from_view(reflected.boxes, View(1.0, True), batch, mirrored)
    torch.testing.assert_close(found.scores, reflected.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.boxes, boxes, atol=1e-2, rtol=0)
    torch.testing.assert_close(found.masks, reflected.masks.flip(-1), atol=1e-2, rtol=0)  # pixels are whole numbers


@torch.no_grad()
def test_a_mirrored_image_has_mirrored_keypoints():
    batch, _ = random_batch()
    augmented = Augmented(keypoint_model(), scales=[1.0, 1.5], mirrored=SWAP)
    mirrored = view_of(batch, View(1.0, True))
    found, reflected = augmented(batch), augmented(mirrored)
    width, ours = batch.images.shape[3], reflected.keypoints[:, :, SWAP]
    torch.testing.assert_close(found.keypoints[..., 0], width - ours[..., 0], atol=0.05, rtol=0)
    torch.testing.assert_close(found.keypoints[..., 1:], ours[..., 1:], atol=0.05, rtol=0)


@torch.no_grad()
def test_left_and_right_keypoints_of_a_mirrored_view_change_places():
    """A head that always sees the left eye on the left sees it there in the mirror too: there it is the right one."""
    network, batch = keypoint_model(), random_batch()[0]
    ramp = torch.arange(56.0).expand(56, 56)
    logits = torch.stack([-(ramp - 27.5).abs(), -ramp, ramp])
    network.keypoint_head.forward = lambda features, rois: KeypointPrediction(logits.expand(len(rois), 3, 56, 56), None)
    plain, both = (Augmented(network, flip=flip, mirrored=SWAP)(batch) for flip in (False, True))
    for found in (plain, both):
        x1, x2 = found.boxes[..., 0], found.boxes[..., 2]
        nose, left, right = ((found.keypoints[..., 0] - x1[..., None]) / (x2 - x1)[..., None]).unbind(-1)
        assert found.valid.all() and (left < 0.2).all() and (right > 0.8).all() and ((nose - 0.5).abs() < 0.2).all()
    confused = Augmented(network, mirrored=[0, 1, 2])(batch)
    assert not torch.allclose(confused.keypoints, both.keypoints, atol=1)


@torch.no_grad()
def test_an_image_is_seen_alike_alone_and_in_a_batch():
    batch, _ = random_batch()
    batch.image_sizes[1] = torch.tensor([40, 100])
    batch.images[1, :, 40:] = 0
    batch.images[1, :, :, 100:] = 0
    augmented = Augmented(model(), scales=[0.7, 1.0])
    together = augmented(batch)
    for i, height in enumerate((96, 64)):
        alone = Batch(*(t[i : i + 1] for t in batch))
        alone = augmented(alone._replace(images=alone.images[:, :, :height]))
        for field in ("boxes", "scores", "labels", "masks"):
            assert torch.equal(getattr(alone, field)[0], getattr(together, field)[i]), (i, field)


def test_boxes_go_forth_and_back():
    batch, targets = random_batch()
    batch.image_sizes[1] = torch.tensor([80, 100])
    for view in (View(0.5, False), View(1.0, True), View(1.3, True)):
        seen = view_of(batch, view)
        assert seen.images.shape[2] % 32 == seen.images.shape[3] % 32 == 0
        there = to_view(targets.boxes, view, batch, seen)
        torch.testing.assert_close(from_view(there, view, batch, seen), targets.boxes)
    seen = view_of(batch, View(1.0, True))
    assert torch.equal(seen.images[1, :, :80, :100], batch.images[1, :, :80, :100].flip(2))
    assert not seen.images[1, :, 80:].any() and not seen.images[1, :, :, 100:].any()


@torch.no_grad()
def test_nothing_found():
    batch, _ = random_batch()
    for network in (model(), keypoint_model()):
        network.box_head.score_threshold = 1.0
        found = Augmented(network, mirrored=SWAP)(batch)
        assert not found.valid.any() and (found.masks if found.keypoints is None else found.keypoints).shape[1] == 10


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="scales"):
        Augmented(model(), scales=[])
    for mirrored in (None, [1, 0], [0, 0, 1]):
        with pytest.raises(ValueError, match=r"mirrored=.*3 keypoints"):
            Augmented(keypoint_model(), mirrored=mirrored)
    Augmented(keypoint_model(), flip=False)  # no mirror, no need to know
    with pytest.raises(ValueError, match="no box head"):
        proposals = model()
        proposals.box_head = None
        Augmented(proposals)
