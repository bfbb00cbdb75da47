"""Every quick twin gives what its plain form gives, on odd input too (ties, duplicates, constant, huge norms, far offsets)."""

import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adamp import AdamP as PackageAdamP

from rcp import fast, losses
from rcp.coreset import greedy_k_center
from rcp.fast import kernels, search, training
from rcp.scoring import MemoryBank, nearest_entries, patch_scores

KINDS = [
    "random", "clusters", "duplicates", "constant", "grid", "huge norm", "far offset", "one outlier", "small D",
    "isotropic",
]  # fmt: skip


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


@pytest.fixture
def plain_and_quick(monkeypatch):
    """Calls a function with ``RCP_FAST=0``, then with 1."""

    def both(function):
        found = []
        for value in ("0", "1"):
            monkeypatch.setenv("RCP_FAST", value)
            assert fast.usable() == (value == "1")
            found.append(function())
        return found

    return both


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expansion", ["reciprocal", "plain"])
def test_soft_labels_and_loss(kind, expansion, plain_and_quick):
    x = torch.from_numpy(patches(kind, 200)[1]) / (1e15 if kind == "huge norm" else 1)
    labels = plain_and_quick(lambda: losses.contextual(losses.squared_distances(x), 5, expansion))
    torch.testing.assert_close(*labels, atol=1e-6, rtol=0)

    def loss_and_gradient():
        z = x.clone().requires_grad_()
        losses.relaxed_contrastive(z, labels[0], 1.0).backward()
        return z.grad * x.std().clamp_min(1)

    torch.testing.assert_close(*plain_and_quick(loss_and_gradient), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("orthogonal_to", ["nothing", "rows", "whole"])
def test_adamp_is_the_packages(orthogonal_to):
    """Gradients orthogonal to nothing leave an update as it is; to every row or to the matrix as a whole, it is projected."""
    generator, steps = torch.Generator().manual_seed(1), 100
    theirs = [torch.nn.Parameter(torch.randn(*s, generator=generator)) for s in ((20, 30), (8, 20), (8,))]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    package, own = PackageAdamP(theirs, lr=1e-2, weight_decay=1e-2), training.AdamP(ours, 1e-2, 1e-2, steps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(package, steps)
    for _ in range(steps):
        gradients = [torch.randn(p.shape, generator=generator) for p in theirs]
        for p, gradient in zip(theirs[:2], gradients, strict=False):
            rows = p.detach()
            if orthogonal_to == "rows":
                gradient -= (gradient * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True) * rows
            if orthogonal_to == "whole":
                gradient[:2] += torch.tensor([[3.0], [-3.0]]) * rows[:2]  # not to these rows
                gradient -= (gradient * rows).sum() / rows.square().sum() * rows
                cosines = torch.nn.functional.cosine_similarity(gradient, rows).abs()
                assert cosines.max() > own.delta / rows.shape[1] ** 0.5, "the rows must not do it"
        for p, q, gradient in zip(theirs, ours, gradients, strict=True):
            p.grad, q.grad = gradient, gradient.clone()
        package.step()
        schedule.step()
        own.step()
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_selection(kind, threads, plain_and_quick, monkeypatch):
    """Ties included; the GPU's way expands the square, so there each pick is a farthest one to rounding."""
    monkeypatch.setattr(kernels, "threads", lambda: threads)
    monkeypatch.setattr(search, "pays", lambda *_: True)
    x, count = torch.from_numpy(patches(kind)[1]), 120
    plain, quick = plain_and_quick(lambda: greedy_k_center(x, count))
    if kind in ("grid", "constant", "far offset", "duplicates"):
        assert torch.equal(plain, quick)
    centred = x.double() - x.double().mean(0)
    slack = 1e-5 * centred.square().sum(1).max()
    for picks in (plain, quick, search._greedy_step_by_step(x, count, plain[0], None)):
        assert len(picks.unique()) == count
        near = (centred - centred[picks[0]]).square().sum(1)
        for pick in picks[1:]:
            near[picks[0]] = -1
            assert near[pick] >= near.max() - slack
            near = torch.minimum(near, (centred - centred[pick]).square().sum(1))
            near[pick] = -1


def test_selection_among_some_equals_that_of_a_copy(plain_and_quick, monkeypatch):
    monkeypatch.setattr(search, "pays", lambda *_: True)
    x, among = torch.randn(600, 24), torch.arange(600) % 3 != 0
    for how in ({}, {"start": "random", "seed": 4}):
        copied = among.nonzero()[:, 0][greedy_k_center(x[among], 60, **how)]
        for found in plain_and_quick(lambda how=how: greedy_k_center(x, 60, among=among, **how)):
            assert torch.equal(found, copied)
    captured = search._greedy_step_by_step(x, 60, among.nonzero()[5, 0], among)
    alone = search._greedy_step_by_step(x[among], 60, torch.tensor(5), None)
    assert torch.equal(captured, among.nonzero()[:, 0][alone])


@pytest.mark.parametrize("kind", [*KINDS, "far clusters"])
@pytest.mark.parametrize("entries", [1, 33, 700])
@pytest.mark.parametrize("in_cells", [False, True])
def test_search(kind, entries, in_cells, monkeypatch):
    """The lowest index of equals, where every distance is exact; else an entry as near as the nearest, to float32's last digits."""
    monkeypatch.setattr(search, "IN_CELLS", 0 if in_cells else 10**9)
    rng, x = patches(kind)
    rng.shuffle(x)
    bank, queries = x[:entries], np.concatenate([x[-400:], x[:5]])
    d2 = ((queries.astype(np.float64)[:, None] - bank) ** 2).sum(2)
    memory_bank, asked = MemoryBank(torch.from_numpy(bank), 2), torch.from_numpy(queries)
    found = memory_bank.nearest(asked).numpy()
    if kind in ("grid", "constant", "far offset", "far clusters"):
        assert (found == d2.argmin(1)).all()
    monkeypatch.setattr(kernels, "threads", lambda: 1)
    assert (memory_bank.nearest(asked).numpy() == found).all(), "one thread finds the same"
    rows = np.arange(len(queries))
    np.testing.assert_allclose(d2[rows, found], d2.min(1), rtol=1e-5, atol=0)
    index = torch.from_numpy(rng.integers(entries, size=(len(queries), 3)))
    expected = np.sqrt(np.take_along_axis(d2, index.numpy(), 1))
    np.testing.assert_allclose(memory_bank.distances(asked, index), expected, rtol=1e-5)


def test_compiled_search_needs_neither_openmp_nor_a_folder_to_keep_it_in():
    """numba's own threads end the process where two calls meet, and it refuses to compile where it may not write."""
    code = """
import numba.core.caching, torch
from concurrent.futures import ThreadPoolExecutor
numba.core.caching.CacheImpl._locator_classes = []  # as where no folder can be written
from rcp.fast import kernels, search
assert kernels._FLAGS["cache"] is False
x = torch.randn(300, 40) * torch.linspace(1, 0, 40) ** 9
cells = search.Cells(x)
with ThreadPoolExecutor(4) as pool:
    for found in pool.map(cells.nearest, [x] * 40):
        assert found.tolist() == list(range(300))
"""
    here = os.environ | {"NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_where_cells_rule_nothing_out_all_distances_are_computed(monkeypatch):
    """Whitened patches vary alike in all directions: the bounds would cost ten times what they save."""
    monkeypatch.setattr(search, "IN_CELLS", 0)
    x = torch.randn(500, 300)
    bank = MemoryBank(x[:400], 2)
    assert bank._quick.nearest(x[400:]) is None
    assert torch.equal(bank.nearest(x[400:]), torch.cdist(x[400:], x[:400]).argmin(1))
    narrow = x * torch.linspace(1, 0, 300) ** 20
    assert search.Cells(narrow[:400]).nearest(narrow[400:]) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_scores(kind):
    """Eq. 10 in double precision, around the r* that test_search checks."""
    x = torch.from_numpy(patches(kind)[1])
    queries, bank = x[300:600], MemoryBank(x[:200], 9)
    nearest = bank.nearest(queries)
    entries = x[:200].double()[torch.cat([nearest[:, None], bank.neighbourhood[nearest]], 1)]
    d = (queries.double()[:, None] - entries).norm(dim=2)
    expected = (1 - torch.exp(d[:, 0] - d[:, 1:].logsumexp(1))) * d[:, 0]
    torch.testing.assert_close(patch_scores(queries, bank).double(), expected, rtol=1e-4, atol=1e-4)


def test_bound_of_distances_holds():
    x = torch.randn(400, 64, dtype=torch.float64) * torch.linspace(2, 0.01, 64) + 30
    leading = search.Leading(x.float())
    y = leading(x.float())
    error = 2 * leading.error * y.norm(dim=1).max()
    assert (torch.cdist(y.double(), y.double()) - torch.cdist(x, x) <= error).all() and error < 0.05
    assert torch.cdist(y, y).mean() > 0.8 * torch.cdist(x, x).mean(), "tight enough to be of use"


def test_search_without_faiss_is_the_same(monkeypatch):
    queries, bank = torch.randn(9, 4), torch.randn(12, 4)
    with_faiss = {k: nearest_entries(queries, bank, k) for k in (1, 3)}
    monkeypatch.setattr("rcp.scoring._faiss", lambda: None)
    assert all(torch.equal(nearest_entries(queries, bank, k), found) for k, found in with_faiss.items())
    with pytest.raises(ValueError, match="k: expected at most 12"):
        nearest_entries(queries, bank, 13)


@pytest.mark.parametrize("fails", [False, True])
def test_capture_leaves_the_state_and_falls_back_with_a_notice(fails, monkeypatch, caplog):
    """What a CUDA graph would be asked, where there is no GPU."""
    replayed = []

    @contextmanager
    def graph(_):
        if fails:
            raise RuntimeError("operation not permitted")
        yield

    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, value in {
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: replayed.append(1)), "Stream": lambda: stream,
        "current_stream": lambda: stream, "stream": lambda _: nullcontext(), "graph": graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    total, example = torch.zeros(3), torch.ones(3)

    def step(x):
        return total.add_(x)

    with caplog.at_level("WARNING", logger="rcp"):
        replay = fast.captured(step, [total], [example], what="training")
    assert torch.equal(total, torch.zeros(3))
    replay(torch.full((3,), 5.0))
    if fails:
        assert replay is step and "training: no CUDA graph (operation not permitted)" in caplog.text
        assert total.tolist() == [5.0] * 3
    else:
        assert example.tolist() == [5.0] * 3 and replayed == [1] and not caplog.text
