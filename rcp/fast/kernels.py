"""The compiled parts of :mod:`rcp.fast.search`."""

from threading import Lock

import numba
import numpy as np
import torch

_FLAGS = {"fastmath": {"reassoc", "contract", "nsz"}, "cache": True}  # sums of squares may be vectorised
try:
    numba.njit(**_FLAGS)(lambda: 0)
except RuntimeError:  # no folder to keep compiled code in can be written
    _FLAGS["cache"] = False
ALONE = Lock()  # held by who calls: where there is no OpenMP, two calls at a time end the process


def threads() -> int:
    """How many to use: no more than torch does. Sets numba's pool to it."""
    count = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(count)
    return count


@numba.njit(inline="always", **_FLAGS)
def _squared_distance(a, b, start, stop):
    total = np.float32(0)
    for k in range(start, stop):
        total += (a[k] - b[k]) ** 2
    return total


@numba.njit(**_FLAGS)
def _reach(near, error):
    """A squared distance whose lower bound is above this is not under ``near``; a margin of 1e-4 and ``error`` allows for rounding."""
    return (np.sqrt(near) * np.float32(1.0001) + error) ** 2


@numba.njit(**_FLAGS)
def _update(i, t, x, y, centers, leading, near, upto, floor, error):
    """Compares patch i with the picks upto[i] … t - 1, until its distance is under ``floor``; returns that distance."""
    j = upto[i]
    if j < t and near[i] > 0:
        reach = _reach(near[i], error)
        while j < t and near[i] >= floor:
            bound = _squared_distance(y[i], leading[j], 0, 16)
            if bound <= reach:
                bound += _squared_distance(y[i], leading[j], 16, y.shape[1])
                if bound <= reach:
                    d2 = _squared_distance(x[i], centers[j], 0, x.shape[1])
                    if d2 < near[i]:
                        near[i] = d2
                        reach = _reach(d2, error)
            j += 1
        upto[i] = j
    return near[i]


@numba.njit(parallel=True, **_FLAGS)
def lazy_greedy(x, y, near, count, first, error, threads):
    """x: (N, D) float32, y: (N, 32) float32 with ‖y_i - y_j‖ <= ‖x_i - x_j‖ + error -> (count,) int64 picks.

    near: (N,) float32, inf, or -1 where a patch may not be picked; changed in place.
    """
    n = len(x)
    upto = np.zeros(n, np.int32)  # how many picks ``near`` knows of
    picks = np.empty(count, np.int64)
    centers, leading = np.empty((count, x.shape[1]), np.float32), np.empty((count, y.shape[1]), np.float32)
    found, where = np.empty(threads, np.float32), np.empty(threads, np.int64)
    pick = first
    for t in range(count):
        if t > 0:
            likely = near.argmax()
            floor = _update(likely, t, x, y, centers, leading, near, upto, np.float32(-1), error)
            for thread in numba.prange(threads):
                best, at = floor, likely
                for i in range(thread * n // threads, (thread + 1) * n // threads):
                    if near[i] > best or (near[i] == best and i < at):
                        d2 = _update(i, t, x, y, centers, leading, near, upto, best, error)
                        if d2 > best or (d2 == best and i < at):
                            best, at = d2, i
                found[thread], where[thread] = best, at
            winner = 0
            for thread in range(1, threads):
                if found[thread] > found[winner] or (found[thread] == found[winner] and where[thread] < where[winner]):
                    winner = thread
            pick = where[winner]
        picks[t] = pick
        centers[t], leading[t] = x[pick], y[pick]
        near[pick] = -1
    return picks


@numba.njit(parallel=True, **_FLAGS)
def nearest_in_cells(x, y, to_pivots, lengths, bank, leading, ids, starts, radii, longest, error, most, threads):
    """Nearest entries in a bank that lies in cells around pivots: e of the cell of c is no nearer to q than | ‖q - c‖ - ‖e - c‖ |.

    x: (n, D), y: (n, d), their leading numbers; to_pivots: (n, K) of ‖y - c‖; lengths: (n,) = ‖y‖; bank: (M, D). In the order of the
    cells, and within a cell by radius: leading (M, d), ids (M,) into the bank, radii (M,) = ‖e - c‖ of the leading numbers.
    starts: (K + 1,), where each cell begins. longest: the largest ‖e‖ of
    the leading numbers; error: of a length, as :class:`rcp.fast.search.Leading` has it. most: comparisons of 16 numbers for a query,
    about, after which it is given up; then -1 is returned for it.
    """
    n, cells = to_pivots.shape
    found = np.empty(n, np.int64)
    for thread in numba.prange(threads):
        for i in range(thread, n, threads):  # far patches lie side by side
            slack = error * (lengths[i] + longest)
            own = to_pivots[i].argmin()
            best, at, reach = np.float32(np.inf), len(bank), np.float32(np.inf)
            left = most
            for number in range(-1, cells):
                cell = own if number < 0 else number
                if number == own:
                    continue  # it came first
                distance, j, stop = to_pivots[i, cell], starts[cell], starts[cell + 1]
                if j == stop or radii[stop - 1] < distance - reach:
                    continue
                if radii[j] < distance - reach:
                    j += np.searchsorted(radii[j:stop], distance - reach)
                while j < stop and radii[j] <= distance + reach and left > 0:
                    left -= 1
                    bound, k = _squared_distance(y[i], leading[j], 0, 16), 16
                    while bound <= reach**2 and k < y.shape[1]:
                        bound += _squared_distance(y[i], leading[j], k, min(2 * k, y.shape[1]))
                        k *= 2
                    if bound <= reach**2:
                        left -= x.shape[1] // 32
                        d2 = _squared_distance(x[i], bank[ids[j]], 0, x.shape[1])
                        if d2 < best or (d2 == best and ids[j] < at):
                            best, at = d2, ids[j]
                            reach = np.sqrt(_reach(best, slack))
                    j += 1
            found[i] = at if left > 0 and at < len(bank) else -1
    return found
