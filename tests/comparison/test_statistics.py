"""Per-image matching and resampling against pycocotools, and intervals against data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.comparison.statistics import Bands, MatchedDetections, difference, draws, match, metrics, resample
from detector.evaluation import coco_metrics
from detector.evaluation.tables import COLUMNS
from tests.evaluation.test_coco import crowded_case, random_case


def same(found, expected):
    for name in (*COLUMNS, "AR100"):
        value = found[name][0]
        assert (expected[name] == -1 and np.isnan(value)) or value == pytest.approx(expected[name], abs=1e-12), name


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), iou_type=st.sampled_from(["bbox", "segm", "boundary"]))
def test_the_unweighted_table_is_coco(seed, iou_type):
    truth, predictions = random_case(seed)
    same(metrics(resample(match(truth, predictions, iou_type))), coco_metrics(truth, predictions, iou_type))


def test_conformance_set(shared):
    folder = shared / "data" / "coco_eval_conformance"
    for iou_type in ("bbox", "segm"):
        files = folder / "instances_val2014_100.json", folder / f"instances_val2014_fake{iou_type}100_results.json"
        same(metrics(resample(match(*files, iou_type))), coco_metrics(*files, iou_type))


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_a_weight_is_that_many_copies_of_the_image(seed, data):
    truth, predictions = random_case(seed, images=4)
    for i, prediction in enumerate(predictions):
        prediction["score"] += i * 1e-6  # between equal scores of two images the order is arbitrary
    weights = data.draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))
    copies = {"images": [], "annotations": [], "categories": truth["categories"]}
    results = []
    for image, weight in enumerate(weights):
        for copy in range(weight):
            name = 10 * image + copy
            copies["images"].append(truth["images"][image] | {"id": name})
            for group, entries in ((copies["annotations"], truth["annotations"]), (results, predictions)):
                group += [e | {"image_id": name, "id": 0} for e in entries if e["image_id"] == image]
    found = metrics(resample(match(truth, predictions), np.array([weights])))
    same(found, coco_metrics(copies, results))


def test_ap_per_threshold_averages_to_ap():
    table = resample(match(*random_case(5)))
    found = metrics(table)
    assert found["curve"].shape == (1, 10) and found["curve"].mean() == pytest.approx(found["AP"][0])
    assert found["curve"][0, 0] == found["AP50"][0] and found["curve"][0, 5] == found["AP75"][0]


def test_chunks_do_not_matter_and_draws_are_reproducible():
    matches, weights = match(*random_case(1, images=9)), draws(9, 50, seed=3)
    assert (weights.sum(1) == 9).all() and (weights == draws(9, 50, seed=3)).all() and (weights > 1).any()
    for a, b in zip(resample(matches, weights, chunk=7), resample(matches, weights)):
        np.testing.assert_array_equal(a, b)


def test_no_detections_and_classes_without_objects():
    truth, _ = random_case(0)
    truth["categories"].append({"id": 99, "name": "absent"})
    found = resample(match(truth, []), draws(6, 20))
    assert np.isnan(found.precision[:, 3]).all() and np.nanmax(found.precision) == 0
    assert (metrics(found)["AP"] == 0).all()


def test_keypoints_are_refused():
    with pytest.raises(ValueError, match="iou_type is 'keypoints'; choose bbox, segm or boundary"):
        match(*random_case(0), "keypoints")


# ------------------------------------------------------------------------------------------------------- calibration


def simulated(rng, images, quality):
    """Matches of detectors of given quality on new images: `quality` is the chance that an object is found.

    Images differ in difficulty, which both detectors of a pair share.
    """
    difficulty = rng.normal(0, 0.25, images)
    counts = rng.integers(1, 8, images)
    pair = []
    for q in quality:
        image = np.repeat(np.arange(images), counts)
        found = rng.random(len(image)) < np.clip(q + difficulty[image], 0.02, 0.98)
        false = np.repeat(np.arange(images), rng.integers(0, 5, images))
        score = np.concatenate([rng.beta(4, 2, found.sum()), rng.beta(2, 3, len(false))])
        true = np.zeros((len(score), 4, 10), bool)
        true[: found.sum()] = True
        objects = np.repeat(counts[:, None, None], 4, 2).astype(np.int32)
        where = np.concatenate([image[found], false])
        pair.append(
            MatchedDetections(np.arange(images), ["a"], where, np.zeros(len(score), int), score, true, ~true, objects)
        )
    return pair


def reduced(matches):
    """One area and one threshold say it all where all are equal: a tenth of the time."""
    return matches._replace(
        true=np.where(np.arange(4)[:, None] > 0, False, matches.true),
        false=np.where(np.arange(4)[:, None] > 0, False, matches.false),
        objects=np.where(np.arange(4) > 0, 0, matches.objects),
    )


def ap(matches, weights=None):
    return metrics(resample(reduced(matches), weights))["AP"]


@pytest.mark.slow
def test_intervals_over_images_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    large = [ap(m)[0] for m in simulated(rng, 40_000, (0.55, 0.6))]
    truth, inside, trials = large[1] - large[0], 0, 150
    for trial in range(trials):
        pair = simulated(rng, 100, (0.55, 0.6))
        weights = draws(100, 200, seed=trial)
        found = difference(*([ap(m)[0]] for m in pair), *(ap(m, weights)[None] for m in pair))
        inside += found.low <= truth <= found.high
    assert 0.90 <= inside / trials <= 0.985, inside / trials


def test_intervals_over_images_and_seeds_cover_the_truth():
    """Scores made of a true difference, an image effect, a seed effect, and draws that see the image effect only."""
    rng = np.random.default_rng(1)
    for seeds, seed_sd, image_sd in ((3, 0.5, 0.3), (3, 0.05, 0.3), (5, 0.5, 0.02), (10, 0.2, 0.2)):
        inside = 0
        for _ in range(600):
            image = rng.normal(0, image_sd)
            a, b = rng.normal(0, seed_sd, (2, seeds))
            spread = rng.normal(0, image_sd, 300) + image
            found = difference(a, b + 1 + image, a[:, None] + np.zeros(300), b[:, None] + 1 + spread)
            inside += found.low <= 1 <= found.high
        assert 0.925 <= inside / 600 <= 0.99, (seeds, seed_sd, image_sd, inside / 600)


def test_difference_of_one_run_each_and_of_unequal_numbers():
    spread = np.random.default_rng(0).normal(0.1, 0.02, (1, 500))
    one = difference([0.3], [0.4], np.zeros((1, 500)), spread)
    assert one.delta == pytest.approx(0.1) and one.clear and np.isnan(one.seed_error)
    assert (one.low, one.high) == tuple(np.quantile(spread, [0.025, 0.975]))
    more = difference([0.3], [0.4, 0.5], np.zeros((1, 500)), np.repeat(spread, 2, 0))
    assert more.delta == pytest.approx(0.15) and np.isnan(more.seed_error)
    assert difference([0.3, 0.4], [0.4, 0.5], np.zeros((2, 500)), np.repeat(spread, 2, 0)).seed_error < 1e-9
    unpaired = difference([0.3, 0.32, 0.28], [0.4, 0.5], np.zeros((3, 500)), np.repeat(spread, 2, 0))
    assert unpaired.seed_error == pytest.approx(np.sqrt(0.0004 / 3 + 0.005 / 2))


def test_pairing_by_seed_narrows_the_interval():
    """Runs of one seed share luck: only the spread of their differences counts."""
    a, none = np.array([0.2, 0.4, 0.6]), np.zeros((3, 100))
    together = difference(a, a + [0.05, 0.051, 0.049], none, none + 0.05)
    apart = difference(a, a + [0.05, 0.051, 0.049], none, none + 0.05, paired=False)
    assert together.clear and not apart.clear


def test_nothing_to_compare():
    found = difference([np.nan], [0.4], np.full((1, 9), np.nan), np.zeros((1, 9)))
    assert np.isnan(found.low) and not found.clear


@pytest.mark.parametrize("limit", [100, 150, 300])
def test_more_than_100_detections(limit):
    truth, predictions = crowded_case()
    found = metrics(resample(match(truth, predictions, limit=limit)), limit)
    expected = coco_metrics(truth, predictions, max_detections=[1, 10, limit])
    for name in ("AP", "AP50", "APs", f"AR{limit}"):
        assert found[name][0] == pytest.approx(expected[name], abs=1e-12) and found[name][0] > 0.1


def test_objects_are_measured_apart_by_any_value():
    """Two objects of one size, one found, and a false detection before it: the value decides in which band they are."""
    side = {"width": 100, "height": 100}
    truth = {"images": [{"id": 1, **side}], "categories": [{"id": 1, "name": "a"}]}
    places = ([0, 0, 20, 20], [40, 40, 20, 20])
    common = {"image_id": 1, "category_id": 1}
    truth["annotations"] = [
        {"id": i, "bbox": box, "area": 400, "iscrowd": 0, **common} for i, box in enumerate(places, 1)
    ]
    found = [
        {"bbox": [70, 0, 20, 20], "score": 0.9, **common},
        {"bbox": places[0], "score": 0.8, **common},
    ]
    limits = np.array([[-np.inf, np.inf], [0, 1], [1, 2], [2, 3]])
    bands = Bands(limits, np.array([0.5, 1.5]))
    numbers = metrics(resample(match(truth, found, bands=bands)))
    assert numbers["APs"][0] == pytest.approx(0.5)  # found, behind the false one, which counts in every band
    assert numbers["APm"][0] == 0 and np.isnan(numbers["APl"][0])
    areas = Bands(np.array([[0, 1e10], [0, 100], [100, 900], [900, 1e10]]))
    assert metrics(resample(match(truth, found, bands=areas)))["APm"][0] == metrics(resample(match(truth, found)))["AP"]
