"""Test-time augmentation: one plain view changes nothing, views agree on where things are."""

from __future__ import annotations

import pytest
import torch

from detector.augmented import Augmented, View, back, forth, look
from tests.tiny import random_batch, tiny_model


def model():
    return tiny_model(box_head={"score_threshold": 0.0, "detections_per_image": 10}).eval()


@torch.no_grad()
def test_one_plain_view_is_the_model_itself():
    batch, _ = random_batch()
    for found, expected in zip(Augmented(model(), flip=False)(batch), model()(batch)):
        if expected is not None:
            torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_mirrored_image_has_mirrored_detections():
    batch, _ = random_batch()
    augmented = Augmented(model(), scales=[1.0, 1.5])
    mirrored = look(batch, View(1.0, True))
    found, reflected = augmented(batch), augmented(mirrored)
    boxes = back(reflected.boxes, View(1.0, True), batch, mirrored)
    torch.testing.assert_close(found.scores, reflected.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.boxes, boxes, atol=1e-2, rtol=0)
    torch.testing.assert_close(found.masks, reflected.masks.flip(-1), atol=1e-2, rtol=0)  # pixels are whole numbers


def test_boxes_go_forth_and_back():
    batch, targets = random_batch()
    batch.image_sizes[1] = torch.tensor([80, 100])
    for view in (View(0.5, False), View(1.0, True), View(1.3, True)):
        seen = look(batch, view)
        assert seen.images.shape[2] % 32 == seen.images.shape[3] % 32 == 0
        there = forth(targets.boxes, view, batch, seen)
        torch.testing.assert_close(back(there, view, batch, seen), targets.boxes)
    seen = look(batch, View(1.0, True))
    assert torch.equal(seen.images[1, :, :80, :100], batch.images[1, :, :80, :100].flip(2))
    assert not seen.images[1, :, 80:].any() and not seen.images[1, :, :, 100:].any()


@torch.no_grad()
def test_nothing_found():
    batch, _ = random_batch()
    network = tiny_model(box_head={"score_threshold": 1.0, "detections_per_image": 10}).eval()
    found = Augmented(network)(batch)
    assert not found.valid.any() and found.masks.shape[:2] == (2, 10)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="scales"):
        Augmented(model(), scales=[])
