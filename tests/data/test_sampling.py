"""Which images are drawn more often than others."""

from __future__ import annotations

from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detector.data import CocoDataset, TrainingSampler, build_loader
from detector.data.sampling import draw_epoch, image_weights
from tests.data.coco_files import write


@pytest.fixture
def rare(tmp_path):
    """Ten images: a cat in each but the last, a crowd of dogs in the first, a dog in the second, birds in 3 to 6."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 40 + 20 * (i % 2)} for i in range(1, 11)]
    objects = [(i, 1, 0) for i in range(1, 10)] + [(1, 2, 1), (2, 2, 0)] + 2 * [(i, 3, 0) for i in range(3, 7)]
    coco = {
        "images": images,
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "iscrowd": crowd, "bbox": [5 + n / 9, 5, 20, 20], "area": 400}
            for n, (i, c, crowd) in enumerate(objects, 1)
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(("cat", "dog", "bird", "cow"), 1)],
    }
    return CocoDataset(tmp_path, write(tmp_path, coco), masks=False)


def weights(data, *args):
    return image_weights(data.annotations, data.rows, *args)


def test_repeat_factors_are_those_of_lvis(rare):
    """By hand: the share of dogs is 1/10, of birds 4/10, of cats 9/10."""
    expected = [1, (0.5 / 0.1) ** 0.5, *4 * [(0.5 / 0.4) ** 0.5], 1, 1, 1, 1]
    np.testing.assert_allclose(weights(rare, "repeat_factor", 0.5), expected)


def test_a_threshold_that_changes_nothing_is_told(rare, caplog):
    assert weights(rare, "repeat_factor", 0.001) is None
    assert "repeat_factor changes nothing: every category is in at least 0.1 of the images" in caplog.text
    assert weights(rare, "uniform") is None


def test_balanced_classes_come_equally_often(rare):
    found = weights(rare, "class_balanced")
    assert found[9] == 1 and found.sum() == pytest.approx(10)
    chance = found[:9] / found[:9].sum()  # 1/3 for each category, shared by its images
    np.testing.assert_allclose(chance, np.array([1, 1 + 9, *4 * [1 + 9 / 4], 1, 1, 1]) / 27)


def test_options_that_cannot_be(rare):
    with pytest.raises(ValueError, match=r"data\.sampling = 'rare': must be one of uniform, repeat_factor"):
        weights(rare, "rare")
    with pytest.raises(ValueError, match=r"data.repeat_threshold = 0: must be a share"):
        weights(rare, "repeat_factor", 0)


@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=40), st.integers(0, 2**31))
def test_an_epoch_has_as_many_samples_as_images_and_their_shares(values, seed):
    values = np.array(values)
    images, copies = draw_epoch(values, np.random.default_rng(seed))
    assert len(images) == len(values)
    counts, wanted = np.bincount(images, minlength=len(values)), values / values.sum() * len(values)
    assert (np.abs(counts - wanted) < 1 + 1e-6).all()
    assert len(set(zip(images.tolist(), copies.tolist()))) == len(images)
    assert all(sorted(copies[images == i]) == list(range(count)) for i, count in enumerate(counts))


def test_shares_over_many_epochs():
    values, rng = np.array([0.25, 0.5, 1.0, 6.25]), np.random.default_rng(0)
    counts = sum(np.bincount(draw_epoch(values, rng)[0], minlength=4) for _ in range(4000))
    np.testing.assert_allclose(counts / counts.sum(), values / values.sum(), atol=0.01)


@given(st.integers(1, 30), st.sampled_from([4, 8]), st.integers(0, 2**31), st.booleans(), st.integers(0, 20))
def test_the_order_is_resumed_and_sharded(length, batch_size, seed, grouped, done):
    rng = np.random.default_rng(seed)
    options = {"seed": seed, "weights": rng.uniform(0.1, 9, length)}
    options["aspect_ratios"] = rng.choice([0.7, 1.5], length) if grouped else None
    whole = list(islice(TrainingSampler(length, batch_size, **options), done + 5))
    assert len({sample for batch in whole for sample in batch}) == len(whole) * batch_size  # no two augmented alike
    parts = [islice(TrainingSampler(length, batch_size, rank=r, world=2, **options), done + 5) for r in range(2)]
    assert [list(chain(*pair)) for pair in zip(*parts)] == whole
    sampler = TrainingSampler(length, batch_size, **options)
    sampler.load_state_dict({"position": done * batch_size})
    assert list(islice(sampler, 5)) == whole[done:]


def test_the_loader_draws_rare_categories_more_often(rare):
    def seen(**options):
        loader = build_loader(rare, 2, 0, seed=3, **options)
        return np.bincount(torch.cat([batch.image_ids for batch, _ in islice(loader, 50)]).numpy(), minlength=11)

    assert seen()[1:].tolist() == [10] * 10
    often = seen(sampling="repeat_factor", repeat_threshold=0.5)
    assert often[2] > 1.5 * often[1] and often.sum() == 100
    assert seen(sampling="class_balanced")[2] > 25


def test_the_same_picture_is_augmented_anew(rare):
    """Within an epoch too; each sample is a function of its place alone."""
    sampler = TrainingSampler(10, 10, weights=np.array([1.0] * 9 + [40.0]))
    samples = [sample for sample in next(iter(sampler)) if sample[1] == 9]
    keys = {rare[sample].key for sample in samples}
    assert len(keys) == len(samples) > 5 and keys == {rare[sample].key for sample in samples}


@pytest.mark.parametrize("rule", ["repeat_factor", "class_balanced"])
def test_weights_do_not_depend_on_how_many_images_are_looked_at_together(rare, monkeypatch, rule):
    whole = weights(rare, rule, 0.5)
    monkeypatch.setattr("detector.data.sampling.PART", 3)
    assert weights(rare, rule, 0.5).tolist() == whole.tolist()
