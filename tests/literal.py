"""The paper's formulas, transcribed literally and slowly: what the fast paths are compared with.

Indices, sets and sums as printed; numpy float64; no shared code with ``rcp``.
"""

import numpy as np
import torch
import torch.nn.functional as F


def dist(a, b):
    return np.sqrt(np.sum((np.asarray(a, float) - np.asarray(b, float)) ** 2))


def pairwise(z, sigma):
    """Eq. 1."""
    n = len(z)
    return np.array([[np.exp(-(dist(z[i], z[j]) ** 2) / sigma) for j in range(n)] for i in range(n)])


def neighbourhood(z, k, self_neighbour=True):
    """N_k(i) = {j : d_ij <= d_il, l the k-th nearest neighbour of i}; i itself is its nearest, or no candidate."""
    n = len(z)
    sets = []
    for i in range(n):
        candidates = [j for j in range(n) if self_neighbour or j != i]
        d = {j: dist(z[i], z[j]) for j in candidates}
        limit = sorted(d.values())[k - 1]
        sets.append({j for j in candidates if d[j] <= limit})
    return sets


def shared(sets, gate=True):
    """Eq. 2."""
    n = len(sets)
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if j in sets[i] or not gate:
                out[i, j] = len(sets[i] & sets[j]) / len(sets[i])
    return out


def reciprocal(sets):
    """Eq. 3."""
    return [{j for j in sets[i] if i in sets[j]} for i in range(len(sets))]


def contextual(z, k, k_half, gate=True, self_neighbour=True, expansion="reciprocal", empty="self"):
    """Eq. 2 to 5; an empty R_{k/2}(i) counts as {i}, or gives 0."""
    n = len(z)
    omega = shared(neighbourhood(z, k, self_neighbour), gate)
    half = neighbourhood(z, k_half, self_neighbour)
    r = reciprocal(half) if expansion == "reciprocal" else half
    hat = np.zeros((n, n))
    for i in range(n):
        members = r[i] or ({i} if empty == "self" else set())
        for j in range(n):
            hat[i, j] = sum(omega[m, j] for m in members) / max(len(members), 1)
    return np.array([[(hat[i, j] + hat[j, i]) / 2 for j in range(n)] for i in range(n)])


def relaxed_contrastive(z, omega, m):
    """Eq. 7."""
    n = len(z)
    d = np.array([[dist(z[i], z[j]) for j in range(n)] for i in range(n)])
    total = 0.0
    for i in range(n):
        for j in range(n):
            delta = d[i, j] / (sum(d[i, l] for l in range(n)) / n)  # noqa: E741
            total += omega[i, j] * delta**2 + (1 - omega[i, j]) * max(m - delta, 0) ** 2
    return total / n


def relaxed_contrastive_autograd(z, omega, m):
    """Eq. 7 in torch float64, with the diagonal left out of the square root so that autograd gives the true gradient."""
    n = len(z)
    total = z.new_zeros(())
    d = [[(z[i] - z[j]).square().sum().sqrt() if i != j else z.new_zeros(()) for j in range(n)] for i in range(n)]
    for i in range(n):
        mean = sum(d[i]) / n
        for j in range(n):
            delta = d[i][j] / mean
            total = total + omega[i, j] * delta**2 + (1 - omega[i, j]) * torch.clamp(m - delta, min=0) ** 2
    return total / n


def greedy_k_center(x, count, first):
    """Each pick is the point with the greatest distance to its nearest pick; the lowest index among equals."""
    picks = [first]
    while len(picks) < count:
        gaps = [-1 if i in picks else min(dist(x[i], x[c]) for c in picks) for i in range(len(x))]
        picks.append(int(np.argmax(gaps)))
    return picks


def patch_score(q, bank, b, self_in=True, squared=False, weighting=True):
    """Eq. 9 and 10 for one patch."""

    def measure(x, y):
        return dist(x, y) ** (2 if squared else 1)

    star = int(np.argmin([dist(q, r) for r in bank]))
    order = sorted(
        (j for j in range(len(bank)) if self_in or j != star), key=lambda j: (dist(bank[star], bank[j]), j != star)
    )
    d = measure(q, bank[star])
    if not weighting:
        return d
    return (1 - np.exp(d) / sum(np.exp(measure(q, bank[j])) for j in order[:b])) * d


def aggregate(maps, p, level_dim, dim):
    """PatchCore's chain: unfold, resize the unfolded patches, pool each to ``level_dim``, concatenate, pool to ``dim``."""
    n, grid, levels = maps[0].shape[0], maps[0].shape[-2:], []
    for m in maps:
        c, h, w = m.shape[1:]
        unfolded = F.unfold(m, p, padding=p // 2).reshape(n, c * p * p, h, w)
        if (h, w) != tuple(grid):
            unfolded = F.interpolate(unfolded, size=grid, mode="bilinear", align_corners=False)
        vectors = unfolded.permute(0, 2, 3, 1).reshape(-1, 1, c * p * p)
        levels.append(F.adaptive_avg_pool1d(vectors, level_dim).squeeze(1))
    return F.adaptive_avg_pool1d(torch.cat(levels, 1).unsqueeze(1), dim).squeeze(1).reshape(n, -1, dim)


def dense_targets(z_bar, k, k_half, sigma, alpha):
    """Eq. 1 to 6 as matrices over all pairs, in torch: the default variant."""
    d = torch.cdist(z_bar, z_bar).fill_diagonal_(0)
    ordered = d.sort(1).values
    near, half = (d <= ordered[:, [j - 1]] for j in (k, k_half))
    shared = torch.where(near, near.float() @ near.float().T / near.sum(1, keepdim=True), 0.0)
    reciprocal = (half & half.T).float()
    expanded = reciprocal @ shared / reciprocal.sum(1, keepdim=True).clamp_min(1)
    return alpha * torch.exp(-d.square() / sigma) + (1 - alpha) * (expanded + expanded.T) / 2


def relaxed_contrastive_dense(z, omega, m):
    """Eq. 7 as matrices over all pairs, in torch, for autograd."""
    d = torch.cdist(z, z)
    delta = d / d.mean(1, keepdim=True)
    return (omega * delta**2 + (1 - omega) * torch.clamp(m - delta, min=0) ** 2).sum() / len(z)


def autograd_training(patches, batches, f, g, k, k_half, sigma, alpha, margin, gamma, rates, weight_decay):
    """Sec. 3.2 step by step: z = g(f(p)), Eq. 7 through autograd, the package's AdamP, Eq. 8. Yields the loss of each batch."""
    from adamp import AdamP

    student = [torch.nn.Parameter(f.clone()), torch.nn.Parameter(g.clone())]
    teacher = [f.clone(), g.clone()]
    optimizer = AdamP(student, lr=rates[0], weight_decay=weight_decay)
    for batch, rate in zip(batches, rates, strict=True):
        p = patches[batch].float()
        omega = dense_targets(p @ teacher[0].T @ teacher[1].T, k, k_half, sigma, alpha)
        z = p @ student[0].T @ student[1].T
        loss = relaxed_contrastive_dense(z, omega, margin)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, quick in zip(teacher, student, strict=True):
                slow.mul_(gamma).add_(quick, alpha=1 - gamma)
        yield loss.detach()


def modified_z_score(scores: np.ndarray, train: np.ndarray, beta: float, deviation) -> np.ndarray:
    """Eq. 11, word for word: deviation is np.median or np.mean."""
    median = np.median(train)
    return np.array([(s - median) / (beta * deviation([abs(t - median) for t in train])) for s in scores])


def image_auroc_difference(labels, first, second) -> float:
    """Mean over seeds of AUROC(first), minus that of second, pair by pair."""

    def auroc(scores):
        pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
        return np.mean(pairs)

    return np.mean([auroc(s) for s in first]) - np.mean([auroc(s) for s in second])


def focal_and_l1(probability: torch.Tensor, masks: torch.Tensor, gamma: float, focal: float, l1: float) -> torch.Tensor:
    """Appendix D's loss, pixel by pixel: -(1 - p_t)^γ log p_t, and |p - mask|, each averaged."""
    terms = []
    for p, defective in zip(probability.flatten(), masks.flatten(), strict=True):
        p_t = p if defective else 1 - p
        terms.append(-focal * (1 - p_t) ** gamma * torch.log(p_t) + l1 * torch.abs(p - float(defective)))
    return torch.stack(terms).mean()
