"""Sampling: counts, and independence of everything but the image's key."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.ops.sampling import IGNORED, NEGATIVE, POSITIVE, random_keys, sample


def verdicts(seed, n, a):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (n, a), generator=generator).to(torch.int8)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 40), st.floats(0, 1))
def test_counts_and_kinds(seed, candidates, size, fraction):
    verdict = verdicts(seed, 2, candidates)
    drawn = sample(verdict, torch.tensor([seed, seed + 1]), size, fraction, stage=0)
    for i in range(2):
        index = drawn.indices[i][drawn.valid[i]]
        assert len(set(index.tolist())) == len(index), "drawn twice"
        assert (verdict[i, index] != IGNORED).all()
        positives = int((verdict[i] == POSITIVE).sum())
        negatives = int((verdict[i] == NEGATIVE).sum())
        expected = min(positives, int(size * fraction), candidates)
        assert int(drawn.positive[i].sum()) == expected
        assert int(drawn.valid[i].sum()) == expected + min(negatives, min(size, candidates) - expected)
        assert (verdict[i, drawn.indices[i]][drawn.positive[i]] == POSITIVE).all()
        assert not (drawn.positive[i, 1:] & ~drawn.positive[i, :-1]).any(), "positives come first"


def test_a_sample_depends_on_its_image_alone():
    verdict, keys = verdicts(0, 4, 50), torch.tensor([5, 6, 7, 8])
    together = sample(verdict, keys, 10, 0.5, stage=1)
    for i in range(4):
        alone = sample(verdict[i : i + 1], keys[i : i + 1], 10, 0.5, stage=1)
        assert torch.equal(alone.indices[0], together.indices[i])
        assert torch.equal(alone.valid[0], together.valid[i])


def test_keys_and_stages_draw_differently_and_evenly():
    verdict = torch.zeros(2000, 20, dtype=torch.int8)
    keys = torch.arange(2000)
    first = sample(verdict, keys, 5, 0.25, stage=0)
    second = sample(verdict, keys, 5, 0.25, stage=1)
    assert not torch.equal(first.indices, second.indices)
    counts = torch.bincount(first.indices.flatten(), minlength=20).float()
    assert ((counts - 500).abs() < 100).all(), counts  # 500 expected, standard deviation about 19


def test_random_keys_are_reproducible_numbers():
    keys = random_keys(torch.tensor([0, 1, -1, 2**62]), 3, stage=0)
    assert (keys >= 0).all()
    assert len(set(keys.flatten().tolist())) == 12
    # SplitMix64 from the state mix(mix(gamma)), worked out with Python's integers.
    mask = (1 << 64) - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    assert keys[0].tolist() == [mix((mix(mix(gamma)) + i * gamma) & mask) >> 1 for i in (1, 2, 3)]
