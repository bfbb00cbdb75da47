"""Locally aware patch features p (Sec. 3.1): the CNN's maps, each neighbourhood (``patch_size`` a side) joined into one vector."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rcp.backbone import ALONE, Backbone, normalize
from rcp.config import Config
from rcp.progress import progress


def aggregate(maps: list[Tensor], patch_size: int, level_dim: int, dim: int) -> Tensor:
    """PatchCore's chain. maps: [(n, C_l, S_l, S_l)], finest first -> p: (n, S_1 · S_1, dim), rows in raster order.

    Zeros outside the map are counted, as the reference does. level_dim: size that each level is pooled to. The reference resizes
    neighbourhoods before it pools them. Both are linear, one over places and the other over numbers, so the order does not matter,
    and there are fewer numbers to resize in this one.
    """
    levels, grid = [], maps[0].shape[-2:]
    for m in maps:
        windows = F.unfold(m, patch_size, padding=patch_size // 2)  # (n, C · p · p, S_l · S_l)
        pooled = F.adaptive_avg_pool1d(windows.transpose(1, 2), level_dim).transpose(1, 2)
        pooled = pooled.unflatten(2, m.shape[-2:])  # (n, level_dim, S_l, S_l)
        if m.shape[-2:] != grid:
            pooled = F.interpolate(pooled, size=grid, mode="bilinear", align_corners=False)
        levels.append(pooled.flatten(2))
    return F.adaptive_avg_pool1d(torch.cat(levels, 1).transpose(1, 2), dim)


def aggregate_mean(maps: list[Tensor], patch_size: int) -> Tensor:
    """Each channel's mean over the p×p neighbourhood, zeros outside the map counted.

    maps: as :func:`aggregate` -> (n, S_1 · S_1, Σ C_l).
    """
    grid = maps[0].shape[-2:]
    means = [F.avg_pool2d(m, patch_size, stride=1, padding=patch_size // 2) for m in maps]
    resized = [F.interpolate(m, size=grid, mode="bilinear", align_corners=False) for m in means]
    return torch.cat(resized, 1).flatten(2).transpose(1, 2)


def pool(p: Tensor, dim: int) -> Tensor:
    """p: (n, D) -> (n, dim), adaptive average pooling of each vector: how PatchCore reaches a smaller dimension."""
    if p.shape[-1] == 2 * dim:  # the same numbers; saves a fifteenth of the time of an inference
        return (p[:, ::2] + p[:, 1::2]) / 2
    return p if p.shape[-1] == dim else F.adaptive_avg_pool1d(p.unsqueeze(1), dim).squeeze(1)


def images_at_a_time(device: torch.device, image_size: int) -> int:
    """How many images (``image_size`` pixels a side) to pass through the CNN together; a GPU wants many.

    Measured on two cores: 4 up to 320 px, where 8 gain nothing; 2 at 480 px, where 4 take 1.3 times as long. A CNN may order its sums by
    the size of its batch, so the last bits of p can depend on it.
    """
    return 32 if device.type != "cpu" else 4 if image_size <= 320 else 2 if image_size <= 480 else 1


class PatchExtractor:
    """Images -> patch features p, as they are held and stored.

    Args:
        config: backbone, weights, backbone_dtype, layers, aggregation, patch_size, extracted_dim and feature_dtype are used.
        device: where the CNN runs.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.backbone_dtype = getattr(torch, config.backbone_dtype)
        cnn = Backbone(config.backbone, config.weights, config.layers)
        self.backbone = cnn.to(device, self.backbone_dtype, memory_format=torch.channels_last)
        how = {"patch_size": config.patch_size, "level_dim": config.level_dim, "dim": config.extracted_dim}
        means = partial(aggregate_mean, patch_size=config.patch_size)
        self.aggregate = means if config.aggregation == "mean" else partial(aggregate, **how)
        with torch.inference_mode():
            first = self.maps(np.zeros((1, config.image_size, config.image_size, 3), np.uint8))[0]
        self._shape = (*first.shape[-2:], config.extracted_dim or sum(self.backbone.channels))
        self._shared = config.tile_overlap * first.shape[-1] // config.image_size  # patches of an overlap

    def shape(self) -> tuple[int, int, int]:
        """(h, w, D) of one image's features, of all its tiles."""
        (rows, columns), (h, w, dim), shared = self.config.tiles, self._shape, self._shared
        return rows * h - (rows - 1) * shared, columns * w - (columns - 1) * shared, dim

    @torch.inference_mode()
    def maps(self, images: np.ndarray) -> list[Tensor]:
        """images: (n, S, S, 3) uint8 -> the backbone's maps [(n, C_l, S_l, S_l)], float32."""
        images = normalize(torch.from_numpy(np.ascontiguousarray(images)).to(self.device))
        with ALONE, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the same features as on a CPU
            return [m.float() for m in self.backbone(images.to(self.backbone_dtype))]

    @torch.inference_mode()
    def patches(self, maps: list[Tensor], out: Tensor | None = None, names: Sequence | None = None) -> Tensor:
        """-> p: (n, h · w, D) in ``feature_dtype``, on the device or in ``out``. names: of the images, for the message.

        Raises:
            FloatingPointError: a feature is NaN or infinite; names the image and the likely cause.
        """
        p = self.aggregate(maps)
        dtype = getattr(torch, self.config.feature_dtype)
        if not torch.stack(torch.aminmax(p)).to(dtype).isfinite().all():  # NaN passes through both
            bad = int((~p.to(dtype).isfinite().flatten(1).all(1)).nonzero()[0])
            weights, image = self.config.weights, names[bad] if names else f"image {bad}"
            cause = f"damaged weights ({weights}), or values beyond float16 (then set feature_dtype='float32')"
            raise FloatingPointError(f"features of {image} hold NaN or infinity; likely cause: {cause}")
        return p.to(dtype) if out is None else out.copy_(p)

    def __call__(self, images: np.ndarray, out: np.ndarray | None = None, names: Sequence | None = None) -> np.ndarray:
        """images: (n, S, S, 3) uint8 -> p: (n, h · w, D) in ``feature_dtype``, written into ``out`` (a memory map) if given.

        With tiles, images are so many times as tall and wide, each tile goes through the CNN by itself, and p is that of the whole again.
        Where tiles overlap, it is cut in the middle: each patch is of the tile in which it lies farther from the border.
        names: of the images, for messages.

        Raises:
            FloatingPointError: as :meth:`patches`.
        """
        h, w, dim = self.shape()
        names = names or [f"image {i}" for i in range(len(images))]
        if out is None:
            out = np.empty((len(images), h * w, dim), self.config.feature_dtype)
        if self.config.tiles == (1, 1):
            return self._extract(images, out, names)
        side, (tall, wide, _), shared = self.config.image_size, self._shape, self._shared
        step, places = side - self.config.tile_overlap, list(np.ndindex(*self.config.tiles))
        for image, p, name in zip(images, out, names, strict=True):
            cut = np.stack([image[r * step : r * step + side, c * step : c * step + side] for r, c in places])
            of_tiles = np.empty((len(cut), tall * wide, dim), p.dtype)
            self._extract(cut, of_tiles, [f"{name}, tile {n + 1}" for n in range(len(cut))])
            whole = np.empty((h, w, dim), p.dtype)
            for (r, c), tile in zip(places, of_tiles.reshape(-1, tall, wide, dim), strict=True):
                y, x = r * (tall - shared), c * (wide - shared)
                top, left = (shared // 2 if n else 0 for n in (r, c))  # what the tile before keeps
                whole[y + top : y + tall, x + left : x + wide] = tile[top:, left:]
            p[:] = whole.reshape(p.shape)
        return out

    def _extract(self, images: np.ndarray, out: np.ndarray, names: Sequence) -> np.ndarray:
        """A few images at a time, each of one tile, into ``out``."""
        batch = images_at_a_time(self.device, self.config.image_size)
        for start in progress(range(0, len(images), batch), "features"):
            part = slice(start, start + batch)
            self.patches(self.maps(images[part]), torch.from_numpy(np.asarray(out[part])), names[part])
        return out
