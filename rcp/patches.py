"""Locally aware patch features (Sec. 3.1), PatchCore's chain without its p² unfold.

The reference unfolds every p×p neighbourhood, resizes the unfolded patches to the finest grid, pools each flattened
(C·p·p) vector to ``level_dim``, concatenates the levels and pools again to ``dim``. All of it is linear in the maps and the same at every
position, so it is one fixed banded matrix over (C, p, p) per level, that is, one (grouped) convolution, then the resize.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcp.backbone import Backbone, normalize, quick_with_single_pictures
from rcp.config import Config


class PatchAggregator(nn.Module):
    """maps: [(n, C_l, S_l, S_l)] finest first -> p: (n, S_1 · S_1, dim), rows in raster order, dtype of the maps.

    Args:
        channels: C_l of each level.
        patch_size: side of the neighbourhood, odd; zeros outside the map are counted, as the reference does.
        level_dim: size that each level is pooled to.
        dim: size that their concatenation is pooled to.
    """

    def __init__(self, channels: tuple[int, ...], patch_size: int, level_dim: int, dim: int):
        super().__init__()
        self.patch_size, self.dim = patch_size, dim
        second = _pooling_matrix(len(channels) * level_dim, dim)  # (dim, levels · level_dim)
        self.rows, self.groups = [], []
        for level, c in enumerate(channels):
            first = _pooling_matrix(c * patch_size**2, level_dim)  # (level_dim, C · p · p)
            chain = torch.sparse.mm(second[:, level * level_dim : (level + 1) * level_dim].to_sparse(), first)
            used = chain.abs().sum(1).nonzero().flatten()
            rows = slice(int(used[0]), int(used[-1]) + 1)  # banded: a level feeds one run of outputs
            kernel = chain[rows].reshape(-1, c, patch_size, patch_size)
            groups = _groups(kernel)
            self.register_buffer(f"kernel{level}", _diagonal_blocks(kernel, groups), persistent=False)
            self.rows.append(rows)
            self.groups.append(groups)

    def forward(self, maps: list[Tensor]) -> Tensor:
        n, grid = maps[0].shape[0], maps[0].shape[-2:]
        out, filled = maps[0].new_empty(n, *grid, self.dim), 0
        for level, (m, rows, groups) in enumerate(zip(maps, self.rows, self.groups, strict=True)):
            kernel = getattr(self, f"kernel{level}").to(m.dtype)
            part = F.conv2d(m, kernel, padding=self.patch_size // 2, groups=groups)
            if part.shape[-2:] != grid:
                part = F.interpolate(part, size=grid, mode="bilinear", align_corners=False)
            part = part.permute(0, 2, 3, 1)
            shared = max(filled - rows.start, 0)  # outputs that the level before feeds too
            out[..., rows.start : rows.start + shared] += part[..., :shared]
            out[..., rows.start + shared : rows.stop] = part[..., shared:]
            filled = rows.stop
        return out.flatten(1, 2)  # (n, S, S, dim) -> (n, S · S, dim)


def pool(p: Tensor, dim: int) -> Tensor:
    """p: (n, D) -> (n, dim), adaptive average pooling of each vector: how PatchCore reaches a smaller dimension."""
    if p.shape[-1] == dim:
        return p
    if p.shape[-1] == 2 * dim:  # the same numbers, eight times as fast
        return (p[:, ::2] + p[:, 1::2]) / 2
    return F.adaptive_avg_pool1d(p.unsqueeze(1), dim).squeeze(1)


def _pooling_matrix(length: int, dim: int) -> Tensor:
    """(dim, length) matrix A with A v = adaptive_avg_pool1d(v, dim): row d averages ⌊d·length/dim⌋ … ⌈(d+1)·length/dim⌉ - 1."""
    d = torch.arange(dim)
    start, stop = d * length // dim, -(-(d + 1) * length // dim)
    j = torch.arange(length)
    inside = (j >= start[:, None]) & (j < stop[:, None])
    return inside.float() / (stop - start)[:, None]


def _groups(kernel: Tensor) -> int:
    """The largest number of equal diagonal blocks that hold every non-zero of an (out, C, p, p) kernel."""
    used = kernel.abs().sum((2, 3)) > 0
    out, c = used.shape
    for groups in range(min(out, c), 0, -1):
        if out % groups == c % groups == 0:
            blocks = used.reshape(groups, out // groups, groups, c // groups).any(3).any(1)
            if not blocks.fill_diagonal_(False).any():
                return groups
    return 1


def _diagonal_blocks(kernel: Tensor, groups: int) -> Tensor:
    """(out, C, p, p) block-diagonal kernel -> (out, C / groups, p, p), as conv2d(groups=...) wants it."""
    out, c, p, _ = kernel.shape
    blocks = kernel.reshape(groups, out // groups, groups, c // groups, p, p)
    return torch.stack([blocks[g, :, g] for g in range(groups)]).reshape(out, c // groups, p, p).contiguous()


def pictures_at_a_time(device: torch.device) -> int:
    """A batch that is fast: a processor's cache holds the maps of a few pictures, a GPU wants many."""
    return 4 if device.type == "cpu" else 32


class PatchExtractor:
    """Pictures -> patch features p, as they are held and stored.

    Args:
        config: backbone, weights, backbone_dtype, layers, patch_size, extracted_dim and feature_dtype are used.
        device: where the CNN runs.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.backbone_dtype = getattr(torch, config.backbone_dtype)
        self.backbone = Backbone(config.backbone, config.weights, config.layers).to(
            device, self.backbone_dtype, memory_format=torch.channels_last
        )
        self.aggregate = PatchAggregator(
            self.backbone.channels, config.patch_size, config.patch_dim, config.extracted_dim
        ).to(device)
        with torch.inference_mode():
            first = self.maps(np.zeros((1, config.image_size, config.image_size, 3), np.uint8))[0]
        self._shape = (*first.shape[-2:], config.extracted_dim)
        if device.type == "cpu":
            quick_with_single_pictures(self.backbone, self.backbone_dtype)

    def shape(self) -> tuple[int, int, int]:
        """(h, w, D) of one picture's features."""
        return self._shape

    @torch.inference_mode()
    def maps(self, pictures: np.ndarray) -> list[Tensor]:
        """pictures: (n, S, S, 3) uint8 -> the backbone's maps [(n, C_l, S_l, S_l)], float32."""
        images = normalize(torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the same features as on a processor
            return [m.float() for m in self.backbone(images.to(self.backbone_dtype))]

    @torch.inference_mode()
    def patches(self, maps: list[Tensor], out: Tensor | None = None, names: Sequence | None = None) -> Tensor:
        """-> p: (n, h · w, D) in ``feature_dtype``, on the device or in ``out``. names: of the pictures, for the message.

        Raises:
            FloatingPointError: a feature is NaN or infinite; names the picture and the likely cause.
        """
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            p = self.aggregate(maps)
        dtype = getattr(torch, self.config.feature_dtype)
        if not torch.stack(torch.aminmax(p)).to(dtype).isfinite().all():  # NaN passes through both
            bad = int((~p.to(dtype).isfinite().flatten(1).all(1)).nonzero()[0])
            raise FloatingPointError(
                f"features of {names[bad] if names else f'picture {bad}'} hold NaN or infinity; likely cause: damaged weights "
                f"({self.config.weights}), or values beyond float16 (then set feature_dtype='float32')"
            )
        return p.to(dtype) if out is None else out.copy_(p)

    def __call__(
        self,
        pictures: np.ndarray,
        out: np.ndarray | None = None,
        batch: int | None = None,
        names: Sequence | None = None,
    ) -> np.ndarray:
        """pictures: (n, S, S, 3) uint8 -> p: (n, h · w, D) in ``feature_dtype``, written into ``out`` (a memory map) if given.

        Args:
            batch: pictures at a time; None suits the device.
            names: of the pictures, for messages.

        Raises:
            FloatingPointError: as :meth:`patches`.
        """
        batch = batch or pictures_at_a_time(self.device)
        h, w, dim = self.shape()
        if out is None:
            out = np.empty((len(pictures), h * w, dim), self.config.feature_dtype)
        names = names or [f"picture {i}" for i in range(len(pictures))]
        for start in range(0, len(pictures), batch):
            part = slice(start, min(start + batch, len(pictures)))
            self.patches(self.maps(pictures[part]), torch.from_numpy(np.asarray(out[part])), names[part])
        return out
