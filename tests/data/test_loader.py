"""The order of samples, resuming, sharding, and the loader as a whole."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import tracemalloc
from itertools import chain, islice
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from detector.data import EvaluationSampler, TrainingSampler, build_dataset, build_loader
from tests.conftest import ROOT

LENGTHS = st.integers(1, 40)
SEEDS = st.integers(0, 2**31)


def flat(batches) -> list:
    return list(chain.from_iterable(batches))


def ratios(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice([0.7, 1.0, 1.5], length)


@given(LENGTHS, st.sampled_from([4, 8, 12]), SEEDS, st.booleans())
def test_global_batches_are_the_same_for_every_world_size(length, batch_size, seed, grouped):
    aspect = ratios(length, seed) if grouped else None
    whole = [list(islice(TrainingSampler(length, batch_size, seed=seed, aspect_ratios=aspect), 20))]
    for world in (2, 4):
        parts = [
            islice(TrainingSampler(length, batch_size, seed=seed, rank=r, world=world, aspect_ratios=aspect), 20)
            for r in range(world)
        ]
        assert [flat(parts) for parts in zip(*parts)] == whole[0]


@given(LENGTHS, st.integers(1, 10), SEEDS, st.booleans(), st.integers(0, 50))
def test_resuming_continues_the_undisturbed_order(length, batch_size, seed, grouped, done):
    aspect = ratios(length, seed) if grouped else None
    undisturbed = list(islice(TrainingSampler(length, batch_size, seed=seed, aspect_ratios=aspect), done + 5))
    sampler = TrainingSampler(length, batch_size, seed=seed, aspect_ratios=aspect)
    sampler.load_state_dict({"position": done * batch_size, "epoch": 0})
    assert list(islice(sampler, 5)) == undisturbed[done:]
    assert sampler.state_dict() == {"position": done * batch_size, "epoch": done * batch_size // length}


@given(LENGTHS, st.integers(1, 10), SEEDS)
def test_every_image_comes_once_per_epoch(length, batch_size, seed):
    batches = -(-3 * length // batch_size)
    samples = flat(islice(TrainingSampler(length, batch_size, seed=seed), batches))[: 3 * length]
    assert len(set(samples)) == 3 * length
    for epoch in range(3):
        assert sorted(index for e, index in samples if e == epoch) == list(range(length))


@given(LENGTHS, st.integers(1, 10), SEEDS)
def test_grouped_batches_do_not_mix_and_lose_nothing(length, batch_size, seed):
    aspect = ratios(length, seed)
    batches = list(islice(TrainingSampler(length, batch_size, seed=seed, aspect_ratios=aspect), 60))
    for batch in batches:
        assert len(batch) == batch_size and len({aspect[index] < 1 for _, index in batch}) == 1
    samples = flat(batches)
    assert len(set(samples)) == len(samples)
    # what has not come yet waits for a full batch: less than one of each kind
    last = min(epoch for epoch, _ in batches[-1])
    missing = {(epoch, index) for epoch in range(last) for index in range(length)} - set(samples)
    assert len(missing) < 2 * batch_size


def test_epochs_and_seeds_differ():
    one = flat(islice(TrainingSampler(50, 10, seed=1), 10))
    assert [i for _, i in one[:50]] != [i for _, i in one[50:]]
    assert one != flat(islice(TrainingSampler(50, 10, seed=2), 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0, "batch_size": 4}, "length=0"),
        ({"length": 9, "batch_size": 0}, "batch_size=0"),
        ({"length": 9, "batch_size": 3, "world": 2}, "batch_size=3"),
        ({"length": 9, "batch_size": 4, "world": 2, "rank": 2}, "rank=2"),
    ],
)
def test_wrong_sampler_options(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingSampler(**options)


def test_resuming_with_another_batch_size():
    with pytest.raises(ValueError, match="sample 6: it is no multiple of batch_size=4"):
        TrainingSampler(9, 4).load_state_dict({"position": 6})


@given(LENGTHS, st.integers(1, 10), st.integers(1, 4), SEEDS)
def test_evaluation_sees_every_image_once(length, batch_size, world, seed):
    aspect = ratios(length, seed)
    alone = list(EvaluationSampler(length, batch_size, aspect_ratios=aspect))
    shards = [EvaluationSampler(length, batch_size, rank=r, world=world, aspect_ratios=aspect) for r in range(world)]
    batches = [batch for shard in shards for batch in shard]
    assert sorted(flat(batches)) == list(range(length))
    assert sorted(batches) == sorted(alone)  # padding, and so the result, does not depend on the number of ranks
    assert sum(map(len, shards)) == len(batches)


@pytest.fixture(scope="module")
def shapes(shapes_tiny):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        cfg = compose(overrides=["+data=shapes", "+augment=symmetry", f"data.root={shapes_tiny}"])
    return build_dataset(cfg.data, "train", cfg.augment, seed=5)


def assert_equal(one, other):
    for left, right in zip(one[0] + one[1], other[0] + other[1]):
        assert (left is None and right is None) or torch.equal(left, right)


def test_workers_end_when_asked_and_come_back(shapes):
    loader = build_loader(shapes, 4, 1, training=False)
    held = iter(loader)  # an iteration that nobody finishes
    first = next(held)
    workers = multiprocessing.active_children()
    loader.close()
    assert workers and not multiprocessing.active_children()
    assert torch.equal(next(iter(loader))[0].images, first[0].images)
    loader.close()


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")], ids=repr)
def test_a_worker_that_dies_while_it_hands_over_is_named(shapes, monkeypatch, error):
    """Its pipes close first: when reading fails, the process may still look alive."""
    loader = build_loader(shapes, batch_size=2, workers=1)
    batches = iter(loader)
    next(batches)
    iterator = loader._loader._iterator

    def handed_over(*args):
        threading.Timer(0.2, iterator._workers[0].kill).start()
        raise error

    monkeypatch.setattr(iterator, "_try_get_data", handed_over)
    with pytest.raises(RuntimeError, match="DataLoader worker"), contextlib.closing(loader):  # by either of the two
        next(batches)


def test_other_errors_of_a_loader_stay(shapes, monkeypatch):
    with contextlib.closing(build_loader(shapes, batch_size=2, workers=1)) as loader:
        batches = iter(loader)
        next(batches)
        error = FileNotFoundError("x.jpg")
        monkeypatch.setattr(loader._loader._iterator, "_try_get_data", Mock(side_effect=error))
        with pytest.raises(FileNotFoundError) as caught:
            next(batches)
        assert caught.value is error


def test_workers_that_cannot_be_started_say_why(shapes, monkeypatch):
    loader = build_loader(shapes, batch_size=2, workers=1)
    monkeypatch.setattr(loader._loader, "_get_iterator", Mock(side_effect=OSError(12, "Cannot allocate memory")))
    with pytest.raises(OSError, match="allocate memory"):
        next(iter(loader))


def test_workers_make_no_difference(shapes):
    alone, helped = (islice(build_loader(shapes, 4, workers, seed=5), 14) for workers in (0, 2))
    for one, other in zip(alone, helped):
        assert_equal(one, other)


def test_resumed_loader_continues_with_the_same_batches(shapes):
    loader = build_loader(shapes, 4, 2, seed=5)
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == 8:
            break
        if len(batches) == 3:
            state = loader.state_dict()
    assert state == {"position": 12, "epoch": 0} and loader.state_dict()["position"] == 32
    resumed = build_loader(shapes, 4, 0, seed=5, start_position=state["position"])
    for one, other in zip(batches[3:], resumed):
        assert_equal(one, other)


def test_two_ranks_make_up_the_batch_of_one(shapes):
    whole = next(iter(build_loader(shapes, 6, 0, seed=5)))
    halves = [next(iter(build_loader(shapes, 6, 0, seed=5, rank=rank, world=2))) for rank in range(2)]
    assert torch.equal(whole[0].images, torch.cat([half[0].images for half in halves]))
    assert torch.equal(whole[0].sample_keys, torch.cat([half[0].sample_keys for half in halves]))


def test_loader_leaves_the_global_random_state_alone(shapes):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(build_loader(shapes, 4, 2, seed=5)))
    assert torch.equal(before, torch.get_rng_state())


def test_evaluation_loader(shapes):
    loader = build_loader(shapes, 5, 0, training=False)
    ids = torch.cat([batch.image_ids for batch, _ in loader])
    assert len(loader) == 5 and sorted(ids.tolist()) == sorted(shapes.image_ids.tolist())


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_data_configs_have_the_same_keys(path):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        base, other = (compose(overrides=[f"+data={name}"]).data for name in ("base", path.stem))
    assert set(base) == set(other) and set(base.train) == set(other.train) == set(other.val)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "augment").glob("*.yaml")), ids=lambda path: path.stem)
def test_augment_configs_run(path, shapes_tiny):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        cfg = compose(overrides=["+data=shapes", f"+augment={path.stem}", f"data.root={shapes_tiny}"])
    OmegaConf.set_struct(cfg, True)
    for split in ("train", "val"):
        dataset = build_dataset(cfg.data, split, cfg.augment)
        for epoch in range(3):
            sample = dataset[epoch, 0]
            assert sample.image.dtype == np.uint8 and len(sample.boxes) == len(sample.labels) == len(sample.masks)


def test_validation_takes_the_categories_of_training(shapes, shapes_tiny):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        cfg = compose(overrides=["+data=shapes", f"data.root={shapes_tiny}"])
    assert build_dataset(cfg.data, "val", categories=shapes.categories).category_ids == shapes.category_ids
    with pytest.raises(ValueError, match="matched by name"):
        build_dataset(cfg.data, "val", categories=["person"])


def test_an_order_is_no_list_of_all_images():
    """An image takes the bytes of some arrays; as lists of Python numbers it takes over 180."""
    length, aspect = 100_000, ratios(100_000, 0)
    tracemalloc.start()
    try:
        first = next(iter(TrainingSampler(length, 16, aspect_ratios=aspect)))
        training = tracemalloc.get_traced_memory()[1] / length
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        evaluation = EvaluationSampler(length, 16, aspect_ratios=aspect)
        list(islice(evaluation, 9))
        evaluating = (tracemalloc.get_traced_memory()[1] - before) / length
    finally:
        tracemalloc.stop()
    assert len(first) == 16 and training < 140 and evaluating < 30, (training, evaluating)
