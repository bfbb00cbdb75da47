"""SPADE (Cohen and Hoshen, 2020): the nearest whole images, then the nearest pixels among them. No library has it."""

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rcp.backbone import Backbone, normalize
from rcp.config import Config
from rcp.detector import resolve_device
from rcp.maps import score_maps

BATCH = 8  # images at a time


def deepest(c: Config) -> Backbone:
    """The CNN with levels 1 to 4, or to 3 where the weights end there."""
    try:
        return Backbone(c.backbone, c.weights, (1, 2, 3, 4))
    except ValueError:
        return Backbone(c.backbone, c.weights, (1, 2, 3))


def spade(c: Config, train: np.ndarray, k: int = 50) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Image score: mean squared distance of the pooled deepest level to the ``k`` nearest training images' (Eq. 1 there). Map: each
    pixel's distance to the nearest pixel of those images in the feature pyramid, levels 1 to 3 joined at the size of the first (Eq. 3).

    How levels are brought to one size is not said there: they are repeated (nearest) here, so that squared distances add up by level.

    train: (n, S, S, 3) uint8 -> a function of such images: scores (n,), maps (n, S, S), float32.
    """
    device = resolve_device(c.device)
    cnn, k = deepest(c).to(device), min(k, len(train))

    def look(images: np.ndarray) -> list[Tensor]:
        parts = [cnn(normalize(some.to(device))) for some in torch.from_numpy(images).split(BATCH)]
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    @torch.inference_mode()
    def predict(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores, maps = [], []
        for image in images:
            own = look(image[None])
            squared, nearest = ((pooled - own[-1].mean((2, 3))) ** 2).sum(1).topk(k, largest=False)
            scores.append(float(squared.mean()))
            maps.append(pyramid_distances([m[0] for m in own[:3]], [m[nearest] for m in gallery[:3]]))
        return np.array(scores, np.float32), score_maps(torch.stack(maps).cpu(), (c.image_size, c.image_size), c.blur)

    with torch.inference_mode():
        gallery = look(train)
        pooled = gallery[-1].mean((2, 3))
    return predict


def pyramid_distances(levels: Sequence[Tensor], gallery: Sequence[Tensor], rows: int = 392) -> Tensor:
    """Distance of each pixel to the nearest of the gallery's, all levels repeated to the first's size and joined.

    levels: [(C_l, S_l, S_l)], gallery: [(k, C_l, S_l, S_l)], finest first -> (S_1, S_1). rows: pixels at a time.
    """
    sides, found = [m.shape[-1] for m in levels], []
    nested = all(fine % coarse == 0 for fine, coarse in pairwise(sides))
    # of each pixel of the first level, the pixel of this one that is repeated there
    places = [torch.arange(float(m[0].numel()), device=m.device).view(1, 1, *m.shape[1:]) for m in levels]
    places = [F.interpolate(index, sides[0]).long().flatten() for index in places]
    sets = [of.flatten(2).transpose(1, 2).flatten(0, 1) for of in gallery]  # (k · S_l · S_l, C_l)
    squares = [of.square().sum(1) for of in sets]
    for some in torch.arange(sides[0] ** 2, device=places[0].device).split(rows):
        total, own = torch.zeros(()), torch.zeros(())
        for m, of, square, place in zip(levels, sets, squares, places, strict=True):
            asked, back = place[some].unique(return_inverse=True)
            x = m.flatten(1).T[asked]
            d2 = torch.addmm(square, x, of.T, alpha=-2)  # less ‖x‖², which is the same for the whole gallery
            d2 = (d2[back] if len(x) < len(back) else d2).unflatten(1, (-1, *m.shape[1:]))
            own = own + x.square().sum(1)[back]
            if not nested:
                d2 = F.interpolate(d2, sides[0])
            elif total.ndim:  # of the pixels that share a coarser one, the nearest alone counts from there on
                ratio = total.shape[-1] // m.shape[-1]
                total = reduce(torch.minimum, [total[..., i::ratio, :] for i in range(ratio)])
                total = reduce(torch.minimum, [total[..., i::ratio] for i in range(ratio)])
            total = total + d2
        found.append(total.amin((1, 2, 3)) + own)
    return torch.cat(found).clamp(min=0).sqrt().view(sides[0], sides[0])
