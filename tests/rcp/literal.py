"""The paper's formulas, transcribed literally and slowly: what the fast paths are compared with.

Indices, sets and sums as printed; numpy float64; no shared code with ``rcp``.
"""

import copy

import numpy as np
import torch


def dist(a, b):
    return np.sqrt(np.sum((np.asarray(a, float) - np.asarray(b, float)) ** 2))


def pairwise(z, sigma):
    """Eq. 1."""
    n = len(z)
    return np.array([[np.exp(-(dist(z[i], z[j]) ** 2) / sigma) for j in range(n)] for i in range(n)])


def neighbourhood(z, k):
    """N_k(i) = {j : d_ij <= d_il, l the k-th nearest neighbour of i}; i itself is its nearest."""
    sets = []
    for i in range(len(z)):
        d = [dist(z[i], z[j]) for j in range(len(z))]
        sets.append({j for j in range(len(z)) if d[j] <= sorted(d)[k - 1]})
    return sets


def shared(sets):
    """Eq. 2."""
    n = len(sets)
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if j in sets[i]:
                out[i, j] = len(sets[i] & sets[j]) / len(sets[i])
    return out


def reciprocal(sets):
    """Eq. 3."""
    return [{j for j in sets[i] if i in sets[j]} for i in range(len(sets))]


def contextual(z, k, expansion="reciprocal"):
    """Eq. 2 to 5; k/2 is rounded down."""
    n = len(z)
    omega, half = shared(neighbourhood(z, k)), neighbourhood(z, k // 2)
    r = reciprocal(half) if expansion == "reciprocal" else half
    hat = np.array([[sum(omega[m, j] for m in r[i]) / len(r[i]) for j in range(n)] for i in range(n)])
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


def aggregate(maps, patch_size, level_dim, dim):
    """The reference's order: each neighbourhood is resized to the finest grid, then pooled; levels are joined and pooled again."""
    levels, grid = [], maps[0].shape[-2:]
    for m in maps:
        unfolded = torch.nn.functional.unfold(m, patch_size, padding=patch_size // 2).unflatten(2, m.shape[-2:])
        unfolded = torch.nn.functional.interpolate(unfolded, size=grid, mode="bilinear", align_corners=False)
        levels.append(torch.nn.functional.adaptive_avg_pool1d(unfolded.flatten(2).transpose(1, 2), level_dim))
    return torch.nn.functional.adaptive_avg_pool1d(torch.cat(levels, 2), dim)


def greedy_k_center(x, count, first):
    """Each pick is the point with the greatest distance to its nearest pick; the lowest index among equals."""
    picks = [first]
    while len(picks) < count:
        gaps = [-1 if i in picks else min(dist(x[i], x[c]) for c in picks) for i in range(len(x))]
        picks.append(int(np.argmax(gaps)))
    return picks


def patch_score(q, bank, b, weighting=True):
    """Eq. 9 and 10 for one patch."""
    star = int(np.argmin([dist(q, r) for r in bank]))
    order = sorted(range(len(bank)), key=lambda j: (dist(bank[star], bank[j]), j != star))
    d = dist(q, bank[star])
    return (1 - np.exp(d) / sum(np.exp(dist(q, bank[j])) for j in order[:b])) * d if weighting else d


def dense_targets(z_bar, k, sigma, alpha):
    """Eq. 1 to 6 as matrices over all pairs, in torch."""
    d = torch.cdist(z_bar, z_bar).fill_diagonal_(0)
    ordered = d.sort(1).values
    near, half = (d <= ordered[:, [j - 1]] for j in (k, k // 2))
    shared = torch.where(near, near.float() @ near.float().T / near.sum(1, keepdim=True), 0.0)
    reciprocal = (half & half.T).float()
    expanded = reciprocal @ shared / reciprocal.sum(1, keepdim=True).clamp_min(1)
    return alpha * torch.exp(-d.square() / sigma) + (1 - alpha) * (expanded + expanded.T) / 2


def relaxed_contrastive_dense(z, omega, m):
    """Eq. 7 as matrices over all pairs, in torch, for autograd."""
    d = torch.cdist(z, z)
    delta = d / d.mean(1, keepdim=True)
    return (omega * delta**2 + (1 - omega) * torch.clamp(m - delta, min=0) ** 2).sum() / len(z)


def autograd_training(patches, batches, start, c):
    """Sec. 3.2 step by step: z = g(f(p)), Eq. 7 through autograd, the package's AdamP, Eq. 8. Yields the loss of each batch.

    start: a module with linear layers f and g; c: the hyper-parameters.
    """
    from adamp import AdamP

    student, teacher = copy.deepcopy(start), copy.deepcopy(start)
    optimizer = AdamP(student.parameters(), lr=c.lr, weight_decay=c.weight_decay)
    for i, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = c.lr * (1 + np.cos(np.pi * i / len(batches))) / 2
        p = patches[batch].float()
        with torch.no_grad():
            omega = dense_targets(teacher.g(teacher.f(p)), c.k, c.sigma, c.alpha)
        loss = relaxed_contrastive_dense(student.g(student.f(p)), omega, c.margin)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, quick in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.mul_(c.gamma).add_(quick, alpha=1 - c.gamma)
        yield loss.detach()


def modified_z_score(scores: np.ndarray, train: np.ndarray, beta: float, deviation) -> np.ndarray:
    """Eq. 11, word for word: deviation is np.median or np.mean."""
    median = np.median(train)
    return np.array([(s - median) / (beta * deviation([abs(t - median) for t in train])) for s in scores])


def focal_and_l1(probability: torch.Tensor, masks: torch.Tensor, gamma: float, focal: float, l1: float) -> torch.Tensor:
    """Appendix D's loss, pixel by pixel: -(1 - p_t)^γ log p_t, and |p - mask|, each averaged."""
    terms = []
    for p, defective in zip(probability.flatten(), masks.flatten(), strict=True):
        p_t = p if defective else 1 - p
        terms.append(-focal * (1 - p_t) ** gamma * torch.log(p_t) + l1 * torch.abs(p - float(defective)))
    return torch.stack(terms).mean()


# Appendix D's network: one image, weights by their names in the state dict, batch normalisation with what it has stored.


def convolution(x, w, bias=None, stride=1, rate=1):
    """x: (c, y, x), w: (d, c, a, a), zeros around x so that its centre meets every pixel -> (d, ⌈y/stride⌉, ⌈x/stride⌉)."""
    half = w.shape[2] // 2
    out = np.zeros((len(w), -(-x.shape[1] // stride), -(-x.shape[2] // stride)))
    for row, column in np.ndindex(out.shape[1:]):
        for a, b in np.ndindex(w.shape[2:]):
            y, at = row * stride + (a - half) * rate, column * stride + (b - half) * rate
            if 0 <= y < x.shape[1] and 0 <= at < x.shape[2]:
                out[:, row, column] += w[:, :, a, b] @ x[:, y, at]
    return out if bias is None else out + bias[:, None, None]


def normed(x, state, name, **how):
    """A convolution, then (v - mean) / √(variance + 1e-5) · weight + bias for each channel."""
    v = convolution(x, state[f"{name}.0.weight"], **how)
    mean, variance, weight, bias = (
        state[f"{name}.1.{what}"][:, None, None] for what in ("running_mean", "running_var", "weight", "bias")
    )
    return (v - mean) / np.sqrt(variance + 1e-5) * weight + bias


def relu(x):
    return np.maximum(x, 0)


def residual_block(x, state, name):
    """relu(conv(relu(conv(x))) + x), with a 1 × 1 convolution of x where the channels change."""
    shortcut = normed(x, state, f"{name}.shortcut") if f"{name}.shortcut.0.weight" in state else x
    return relu(normed(relu(normed(x, state, f"{name}.first")), state, f"{name}.second") + shortcut)


def atrous_pyramid(x, state, name, rates):
    """DeepLab's ASPP: a 1 × 1 convolution, one 3 × 3 for each rate, and the image's mean everywhere; joined, then one channel."""
    parts = [relu(normed(x, state, f"{name}.branches.0"))]
    parts += [relu(normed(x, state, f"{name}.branches.{i}", rate=rate)) for i, rate in enumerate(rates, 1)]
    mean = x.mean((1, 2), keepdims=True)
    whole = relu(convolution(mean, state[f"{name}.whole.1.weight"], state[f"{name}.whole.1.bias"]))
    parts.append(np.broadcast_to(whole, (len(whole), *x.shape[1:])))
    joined = relu(normed(np.concatenate(parts), state, f"{name}.join"))
    return convolution(joined, state[f"{name}.out.weight"], state[f"{name}.out.bias"])


def bilinear(x, side):
    """(c, n, n) -> (c, side, side): pixels are squares, their values lie in the middle, the border's go on."""
    n = x.shape[1]

    def weights(i):
        place = min(max((i + 0.5) * n / side - 0.5, 0), n - 1)
        low = min(int(place), max(n - 2, 0))
        return {low: 1 - (place - low), min(low + 1, n - 1): place - low} if n > 1 else {0: 1.0}

    out = np.zeros((len(x), side, side))
    for row, column in np.ndindex(side, side):
        for y, wy in weights(row).items():
            for at, wx in weights(column).items():
                out[:, row, column] += wy * wx * x[:, y, at]
    return out


def refiner(state, score_map, *, stride, rates, outlier):
    """score_map: (S, S) -> (S, S) log odds of a defect."""
    size = len(score_map)
    z = (score_map - state["center"]) / state["deviation"]
    x = bilinear(z[None] / outlier, -(-size // stride))
    x = residual_block(residual_block(x, state, "blocks.0"), state, "blocks.1")
    return bilinear(atrous_pyramid(x, state, "head", rates), size)[0] + state["slope"] * z + state["offset"]


def perlin(side, angles):
    """Perlin's noise, pixel by pixel: at the corners of its cell the offset's product with a unit vector, mixed by 6t⁵ - 15t⁴ + 10t³."""
    rows, columns = angles.shape[0] - 1, angles.shape[1] - 1
    out = np.zeros((side, side))
    for i, j in np.ndindex(out.shape):
        y, x = (i + 0.5) * rows / side, (j + 0.5) * columns / side
        for down, right in np.ndindex(2, 2):
            angle = angles[int(y) + down, int(x) + right]
            dy, dx = y - int(y) - down, x - int(x) - right
            share = 1.0
            for t in (1 - abs(dy), 1 - abs(dx)):
                share *= 6 * t**5 - 15 * t**4 + 10 * t**3
            out[i, j] += share * (np.sin(angle) * dy + np.cos(angle) * dx)
    return np.sqrt(2) * out
