"""Coreset, Eq. 9 to 11 and score maps against their literal transcriptions."""

import literal
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from rcp.coreset import coreset_size, greedy_k_center
from rcp.maps import center_and_deviation, modified_z_score, score_maps
from rcp.scoring import MemoryBank, image_scores, nearest_entries, patch_scores


@pytest.fixture(params=["0", "1"], ids=["plain", "quick"], autouse=True)
def form(request):
    """Every test of this file is of both forms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCP_FAST", request.param)
        patch.setattr("rcp.fast.search.pays", lambda *_: True)
        yield


def draw(seed, n, d, scale=1.0, offset=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + offset


@settings(max_examples=20)
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
    first, second = (greedy_k_center(x, 20, seed=s).tolist() for s in (1, 2))
    assert first == second, "the default draws nothing"
    assert greedy_k_center((300 * x).half(), 9).tolist() == greedy_k_center((300 * x).half().float(), 9).tolist()
    started = greedy_k_center(x, 20, start="random", seed=3).tolist()
    assert started == literal.greedy_k_center(x.numpy(), 20, started[0])


def test_coreset_of_duplicates_picks_each_index_once():
    assert sorted(greedy_k_center(torch.ones(10, 4), 10).tolist()) == list(range(10))
    two = torch.cat([torch.zeros(5, 3), torch.ones(5, 3)])
    assert {int(i) // 5 for i in greedy_k_center(two, 2)} == {0, 1}


@pytest.mark.parametrize(("ratio", "patches", "count"), [(0.01, 163_856, 1638), (0.29, 100, 29), (0.07, 100, 7), (1.0, 3, 3)])  # fmt: skip
def test_coreset_size_is_the_floor(ratio, patches, count):
    assert coreset_size(ratio, patches) == count


def test_coreset_that_selects_nothing():
    message = r"coreset_ratio: expected at least 0\.0013, which is one of 784 patches, got 0\.001"
    with pytest.raises(ValueError, match=message):
        coreset_size(0.001, 784)
    with pytest.raises(ValueError, match="count: expected 1 to 5"):
        greedy_k_center(torch.ones(5, 2), 6)
    with pytest.raises(ValueError, match="count: expected 1 to 4"):
        greedy_k_center(torch.ones(5, 2), 5, among=torch.arange(5) > 0)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 9))
def test_search_is_the_literal_one(seed, k):
    queries, bank = draw(seed, 23, 8), draw(seed + 1, 31, 8)
    ordered = [sorted((literal.dist(q, r), j) for j, r in enumerate(bank)) for q in queries]
    assert nearest_entries(queries, bank, k).tolist() == [[j for _, j in row[:k]] for row in ordered]
    assert MemoryBank(bank, 2).nearest(queries).tolist() == [row[0][1] for row in ordered]


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), b=st.sampled_from([2, 4, 9]), weighting=st.sampled_from(["patches", "none"]))
def test_scores_are_eq_9_and_10(seed, b, weighting):
    queries, entries = draw(seed, 7, 5), draw(seed + 1, 20, 5)
    expected = [literal.patch_score(q, entries.numpy(), b, weighting == "patches") for q in queries.numpy()]
    got = patch_scores(queries, MemoryBank(entries, b), weighting)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_scores_of_odd_input():
    """Where the exponential overflows; of an entry itself; where N_b(r*) is r* alone, for which Eq. 10 would be 0."""
    s = patch_scores(draw(1, 4, 5, scale=1e4), MemoryBank(draw(0, 20, 5), 9))
    assert s.isfinite().all() and (s > 0).all()
    entries = draw(0, 20, 5, offset=1000.0)
    torch.testing.assert_close(patch_scores(entries, MemoryBank(entries, 9)), torch.zeros(20))
    for bank in (MemoryBank(draw(0, 1, 5), 9), MemoryBank(draw(0, 20, 5), 1)):
        torch.testing.assert_close(patch_scores(draw(2, 6, 5), bank), torch.cdist(draw(2, 6, 5), bank.entries).amin(1))


def test_neighbourhoods_survive_duplicates_and_small_banks():
    bank = MemoryBank(torch.ones(12, 3), 4)
    assert bank.neighbourhood.shape == (12, 4) and bank.neighbourhood[:, 0].tolist() == list(range(12))
    assert all(len(set(row)) == 4 for row in bank.neighbourhood.tolist())
    assert MemoryBank(draw(0, 3, 4), 9).neighbourhood.shape == (3, 3)


@pytest.mark.parametrize(("side", "size", "blur"), [(28, 224, 4.0), (28, 224, 0), (4, 16, 9.0), (3, 50, 1.3)])
@pytest.mark.parametrize("kind", ["random", "constant", "one patch", "huge"])
def test_maps_are_what_interpolation_and_scipys_filter_give(side, size, blur, kind):
    scores = torch.rand(3, side, side) * (1e15 if kind == "huge" else 1)
    if kind == "constant":
        scores[:] = 2.5
    if kind == "one patch":
        scores = F.one_hot(torch.tensor([0, side, side**2 - 1]), side**2).float().reshape(3, side, side)
    expected = F.interpolate(scores[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0].numpy()
    expected = gaussian_filter(expected, sigma=(0, blur, blur)) if blur else expected
    got = score_maps(scores, size, blur)
    assert got.dtype == np.float32 and got.shape == (3, size, size)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
    assert torch.equal(image_scores(scores.flatten(1)), scores.flatten(1).max(1).values)


@pytest.mark.parametrize("deviation", ["median", "mean"])
def test_modified_z_score_is_eq_11(deviation):
    rng = np.random.default_rng(3)
    train, scores = rng.gamma(2, 1, 40), rng.gamma(3, 2, (5, 6))
    expected = literal.modified_z_score(scores.ravel(), train, 1.4826, getattr(np, deviation)).reshape(5, 6)
    np.testing.assert_allclose(modified_z_score(scores, *center_and_deviation(train, deviation)), expected, rtol=1e-6)


def test_eq_11_makes_normal_training_scores_standard_only_with_the_median():
    """1.4826 is the constant of the median absolute deviation, which the paper's words call the mean one."""
    train = np.random.default_rng(0).normal(5, 3, 200_000)
    spreads = [modified_z_score(train, *center_and_deviation(train, d)).std() for d in ("median", "mean")]
    assert spreads == pytest.approx([1, 1.2533 / 1.4826], abs=0.01)


def test_eq_11_says_where_it_is_undefined():
    with pytest.raises(ValueError, match="mad: expected a deviation above 0 of the training scores"):
        modified_z_score(np.ones(3), *center_and_deviation(np.ones(5)))
    with pytest.raises(ValueError, match="deviation: expected one of 'median', 'mean', got 'max'"):
        center_and_deviation(np.ones(5), "max")
