"""Coreset, memory bank and scores: Eq. 9 and 10 and greedy k-center against their literal transcriptions."""

import sys

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from rcp import coreset, kernels, memory
from rcp.coreset import coreset_size, greedy_k_center, plain_greedy
from rcp.leading import LeadingDirections, compiled
from rcp.memory import MemoryBank, search
from rcp.scoring import center_and_deviation, image_scores, modified_z_score, patch_scores, score_maps


def draw(seed, n, d, scale=1.0, offset=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + offset


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40), offset=st.sampled_from([0.0, 50.0]))
def test_coreset_is_greedy_k_center_from_the_patch_farthest_from_the_mean(seed, n, offset):
    x, count = draw(seed, n, 6, offset=offset), max(1, n // 3)
    from_mean = [literal.dist(v, x.numpy().mean(0)) for v in x.numpy()]
    picks = greedy_k_center(x, count).tolist()
    assert from_mean[picks[0]] == pytest.approx(max(from_mean), abs=1e-4)  # of two patches, both are the farthest
    assert picks == literal.greedy_k_center(x.numpy(), count, picks[0])


def test_coreset_random_start_and_projection_follow_the_seed():
    x = draw(0, 200, 32)
    picks = [greedy_k_center(x, 20, start="random", projection=8, seed=s).tolist() for s in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]
    assert greedy_k_center(x, 20, seed=1).tolist() == greedy_k_center(x, 20, seed=2).tolist(), (
        "the default draws nothing"
    )
    started = greedy_k_center(x, 20, start="random", seed=3).tolist()
    assert started == literal.greedy_k_center(x.numpy(), 20, started[0])


def test_coreset_of_duplicates_picks_each_index_once():
    x = torch.ones(10, 4)
    assert sorted(greedy_k_center(x, 10).tolist()) == list(range(10))
    two = torch.cat([torch.zeros(5, 3), torch.ones(5, 3)])
    assert {int(i) // 5 for i in greedy_k_center(two, 2)} == {0, 1}


KINDS = [
    "random",
    "clusters",
    "duplicates",
    "constant",
    "grid",
    "huge norm",
    "far offset",
    "one outlier",
    "small D",
    "isotropic",
]


def patches(kind, n=1500):
    """float32 (n, D): on whole numbers every distance is exact, so that equals are equal in any order of summing."""
    rng = np.random.default_rng(len(kind))
    dim = 5 if kind == "small D" else 96
    x = rng.normal(size=(n, dim)) * np.linspace(3, 0.1, dim)
    x = {
        "clusters": x * 0.05 + 5 * rng.normal(size=(20, dim))[rng.integers(20, size=n)],
        "duplicates": x[rng.integers(60, size=n)],
        "constant": np.full((n, dim), 7.0),
        "grid": rng.integers(-2, 3, size=(n, dim)),
        "huge norm": x * 1e15,
        "far offset": x.round() + 1e5,
        "isotropic": rng.normal(size=(n, 40)),  # bounds that nearly reach the distances, and often name another entry
        "one outlier": np.concatenate([x[:-1], np.full((1, dim), 1e4)]),
        "far clusters": x.round() + 4096 * rng.choice([-1, 1], size=(n, 1)),  # lengths round what is near away
    }.get(kind, x)
    return rng, x.astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_pruned_coreset_picks_what_the_plain_loop_picks(kind, threads, monkeypatch):
    """Ties included."""
    rng, x = patches(kind)
    n = len(x)
    started = int(rng.integers(n))
    near, picks = np.full(n, np.inf), [started]
    for _ in range(119):  # the plain loop, in double precision
        near = np.minimum(near, ((x.astype(np.float64) - x[picks[-1]]) ** 2).sum(1))
        near[picks] = -1
        picks.append(int(near.argmax()))
    monkeypatch.setattr(kernels, "threads", lambda: threads)
    assert coreset._lazy_greedy(torch.from_numpy(x), 120, started, None).tolist() == picks
    # the GPU's path expands the square, so that equals can differ in the last digit: each pick is a farthest one to rounding
    centred = torch.from_numpy(x).double()
    centred -= centred.mean(0)
    slack = 1e-5 * centred.square().sum(1).max()
    near = torch.full((n,), torch.inf, dtype=torch.float64)
    for pick in plain_greedy(torch.from_numpy(x), 120, torch.tensor(started)):
        assert near[pick] >= near.max() - slack
        near = torch.minimum(near, (centred - centred[pick]).square().sum(1))
        near[pick] = -1


def test_bound_of_distances_holds():
    x = torch.randn(400, 64, dtype=torch.float64) * torch.linspace(2, 0.01, 64) + 30
    leading = LeadingDirections(x.float())
    y = leading(x.float())
    error = 2 * leading.error * y.norm(dim=1).max()
    assert (torch.cdist(y.double(), y.double()) - torch.cdist(x, x) <= error).all() and error < 0.05
    assert torch.cdist(y, y).mean() > 0.8 * torch.cdist(x, x).mean(), "tight enough to be of use"


def test_coreset_among_some_equals_the_coreset_of_a_copy():
    x = torch.randn(600, 24)
    among = torch.arange(600) % 3 != 0
    for options in ({}, {"start": "random", "seed": 4}):
        copied = greedy_k_center(x[among], 60, **options)
        assert torch.equal(greedy_k_center(x, 60, among=among, **options), among.nonzero()[:, 0][copied])
    assert torch.equal(
        plain_greedy(x, 60, copied[0] * 0 + 1, among), among.nonzero()[:, 0][plain_greedy(x[among], 60, copied[0] * 0)]
    )
    with pytest.raises(ValueError, match="count: expected 1 to 400"):
        greedy_k_center(x, 401, among=among)


def test_without_numba_coreset_and_scores_say_so_and_are_the_same(monkeypatch, caplog):
    x = torch.randn(300, 16)
    expected = greedy_k_center(x, 40)
    scores = patch_scores(x, MemoryBank(x[:20], 5))
    compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "rcp.kernels", None)
    monkeypatch.delattr("rcp.kernels", raising=False)
    with caplog.at_level("WARNING", logger="rcp"):
        assert torch.equal(greedy_k_center(x, 40), expected)
        torch.testing.assert_close(patch_scores(x, MemoryBank(x[:20], 5)), scores, atol=1e-4, rtol=1e-4)
    compiled.cache_clear()
    assert caplog.text.count("no numba") == 1


def test_coreset_covers_better_than_chance():
    x = draw(5, 500, 4)

    def radius(index):
        return torch.cdist(x, x[index]).amin(1).max()

    assert radius(greedy_k_center(x, 25)) < 0.8 * radius(
        torch.randperm(500, generator=torch.Generator().manual_seed(0))[:25]
    )


@pytest.mark.parametrize(
    ("ratio", "patches", "count"), [(0.01, 163_856, 1638), (0.29, 100, 29), (0.07, 100, 7), (1.0, 3, 3)]
)
def test_coreset_size_is_the_floor(ratio, patches, count):
    assert coreset_size(ratio, patches) == count


def test_coreset_that_selects_nothing():
    with pytest.raises(
        ValueError, match=r"coreset_ratio: 0\.001 of 784 patches selects nothing; expected at least 0\.0013"
    ):
        coreset_size(0.001, 784)
    with pytest.raises(ValueError, match="count: expected 1 to 5"):
        greedy_k_center(torch.ones(5, 2), 6)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 9))
def test_faiss_and_torch_search_agree_with_the_literal(seed, k):
    pytest.importorskip("faiss")
    queries, bank = draw(seed, 23, 8), draw(seed + 1, 31, 8)
    expected = torch.tensor(
        [[j for _, j in sorted((literal.dist(q, r), j) for j, r in enumerate(bank))[:k]] for q in queries]
    )
    assert torch.equal(search(queries, bank, k, "torch"), expected)
    assert torch.equal(search(queries, bank, k, "faiss"), expected)


def test_search_without_faiss_falls_back(monkeypatch):
    queries, bank = draw(0, 9, 4), draw(1, 12, 4)
    with_faiss = search(queries, bank, 3)
    monkeypatch.setattr(memory, "_faiss", lambda: None)
    assert torch.equal(search(queries, bank, 3), with_faiss)
    with pytest.raises(ValueError, match="k: expected at most 12"):
        search(queries, bank, 13)


@pytest.mark.parametrize("kind", [*KINDS, "far clusters"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("entries", [1, 33, 700])
def test_bounded_search_finds_what_comparing_all_finds(kind, threads, entries, monkeypatch):
    """The lowest index of equals, where every distance is exact; else an entry as near as the nearest, to float32's last digits."""
    monkeypatch.setattr(kernels, "threads", lambda: threads)
    rng, x = patches(kind)
    rng.shuffle(x)
    bank, queries = x[:entries], np.concatenate([x[-400:], x[:5]])
    d2 = ((queries.astype(np.float64)[:, None] - bank) ** 2).sum(2)
    memory_bank = MemoryBank(torch.from_numpy(bank), 2)
    found = memory_bank.nearest(torch.from_numpy(queries)).numpy()
    if kind in ("grid", "constant", "far offset", "far clusters"):
        assert (found == d2.argmin(1)).all()
    monkeypatch.setattr(memory, "_BOUNDS", 5000)  # some queries at a time
    assert (memory_bank.nearest(torch.from_numpy(queries)).numpy() == found).all()
    rows = np.arange(len(queries))
    np.testing.assert_allclose(d2[rows, found], d2.min(1), rtol=1e-5, atol=0)
    index = torch.from_numpy(rng.integers(entries, size=(len(queries), 3)))
    expected = np.take_along_axis(d2, index.numpy(), 1)
    np.testing.assert_allclose(memory_bank.distances(torch.from_numpy(queries), index), expected, rtol=1e-5)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    b_and_self=st.sampled_from([(1, False), (2, True), (4, True), (9, True), (3, False), (9, False)]),
    squared=st.booleans(),
    weighting=st.sampled_from(["patches", "none"]),
)
def test_scores_are_eq_9_and_10(seed, b_and_self, squared, weighting):
    b, self_in = b_and_self
    queries, entries = draw(seed, 7, 5), draw(seed + 1, 20, 5)
    bank = MemoryBank(entries, b, self_in)
    expected = [
        literal.patch_score(q, entries.numpy(), b, self_in, squared, weighting == "patches") for q in queries.numpy()
    ]
    np.testing.assert_allclose(
        patch_scores(queries, bank, squared=squared, weighting=weighting), expected, rtol=1e-4, atol=1e-5
    )


def test_scores_stay_finite_where_the_exponential_overflows():
    bank = MemoryBank(draw(0, 20, 5), 9)
    s = patch_scores(draw(1, 4, 5, scale=1e4), bank)
    assert s.isfinite().all() and (s > 0).all()


def test_an_entry_scores_zero():
    entries = draw(0, 20, 5, offset=1000.0)
    bank = MemoryBank(entries, 9)
    torch.testing.assert_close(patch_scores(entries, bank), torch.zeros(20))


def test_neighbourhoods_survive_duplicates_and_small_banks():
    bank = MemoryBank(torch.ones(12, 3), 4)
    assert bank.neighbourhood.shape == (12, 4) and bank.neighbourhood[:, 0].tolist() == list(range(12))
    assert MemoryBank(draw(0, 3, 4), 9).neighbourhood.shape == (3, 3)
    assert MemoryBank(draw(0, 3, 4), 9, False).neighbourhood.shape == (3, 2)


def test_image_score_is_the_maximum_and_maps_are_bilinear_then_gaussian():
    s = torch.rand(3, 4, 4)
    assert torch.equal(image_scores(s.flatten(1)), s.flatten(1).max(1).values)
    plain = score_maps(s, 16, 0)
    expected = torch.nn.functional.interpolate(s[None], size=(16, 16), mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(plain, expected, atol=1e-6)
    np.testing.assert_allclose(score_maps(s, 16, 2.0)[1], gaussian_filter(plain[1], 2.0), atol=1e-5)
    assert score_maps(s, 16, 2.0).dtype == np.float32


@pytest.mark.parametrize("deviation", ["median", "mean"])
def test_modified_z_score_is_eq_11(deviation):
    rng = np.random.default_rng(3)
    train, scores = rng.gamma(2, 1, 40), rng.gamma(3, 2, (5, 6))
    median, mad = center_and_deviation(train, deviation)
    expected = literal.modified_z_score(scores.ravel(), train, 1.4826, getattr(np, deviation)).reshape(5, 6)
    np.testing.assert_allclose(modified_z_score(scores, median, mad), expected, rtol=1e-6)


def test_eq_11_makes_normal_training_scores_standard_only_with_the_median():
    """1.4826 is the constant of the median absolute deviation, which the paper's words call the mean one."""
    train = np.random.default_rng(0).normal(5, 3, 200_000)
    spreads = {d: modified_z_score(train, *center_and_deviation(train, d)).std() for d in ("median", "mean")}
    assert spreads["median"] == pytest.approx(1, abs=0.01) and spreads["mean"] == pytest.approx(
        1.2533 / 1.4826, abs=0.01
    )


def test_eq_11_says_where_it_is_undefined():
    with pytest.raises(ValueError, match="mad: expected a deviation above 0 of the training scores"):
        modified_z_score(np.ones(3), *center_and_deviation(np.ones(5)))
    with pytest.raises(ValueError, match="deviation: expected 'median' or 'mean', got 'max'"):
        center_and_deviation(np.ones(5), "max")
