"""The refinement network (Appendix D): a coarse score map in, a fine one out; and its loss."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcp.refinement.options import RefinementConfig


class RefinementNet(nn.Module):
    """Score maps (n, S, S) float32 -> logits of "defective": (n, S, S) float32.

    Two residual blocks and parallel atrous convolutions (DeepLab's ASPP), on a grid ``stride`` times as coarse.

    Args:
        how: stride, channels, rates and outlier are used.
        center, deviation: of normal patch scores (Eq. 11's median and β · MAD); a map enters as z = (s - center) / deviation.
    """

    def __init__(self, how: RefinementConfig, center: float = 0.0, deviation: float = 1.0):
        super().__init__()
        self.how, c = how, how.channels
        self.register_buffer("center", torch.tensor(float(center)))
        self.register_buffer("deviation", torch.tensor(float(deviation)))
        self.blocks = nn.Sequential(ResidualBlock(1, c), ResidualBlock(c, c))
        self.head = AtrousPyramid(c, how.rates)
        # log odds from the map alone: 0, that is even odds, where z equals ``outlier``
        self.slope, self.offset = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-how.outlier))

    def forward(self, maps: Tensor) -> Tensor:
        size = maps.shape[1]
        z = ((maps - self.center) / self.deviation)[:, None]
        # what enters the blocks is of the order of 1 where there is a defect
        coarse = _resized(z / self.how.outlier, -(-size // self.how.stride))
        return (_resized(self.head(self.blocks(coarse)), size) + self.slope * z + self.offset)[:, 0]

    def parameter_groups(self) -> list[dict]:
        """The head and the map's own two weights learn at ``lr_head``, the residual blocks at ``lr_blocks``."""
        blocks, head = list(self.blocks.parameters()), [*self.head.parameters(), self.slope, self.offset]
        return [{"params": blocks, "lr": self.how.lr_blocks}, {"params": head, "lr": self.how.lr_head}]

    @torch.inference_mode()
    def refine(self, maps: np.ndarray) -> np.ndarray:
        """-> (n, S, S) float32 refined maps: how likely a pixel is defective by what was simulated, in [0, 1]."""
        return self(torch.from_numpy(maps).to(self.center)).sigmoid().cpu().numpy()


class ResidualBlock(nn.Module):
    """(n, c, y, x) -> (n, d, y, x): two 3 × 3 convolutions, added to their input (through a 1 × 1 one where c and d differ)."""

    def __init__(self, c: int, d: int):
        super().__init__()
        self.first = _normed(c, d)
        self.second = nn.Sequential(nn.Conv2d(d, d, 3, padding=1, bias=False), nn.BatchNorm2d(d))
        self.shortcut = nn.Identity() if c == d else nn.Sequential(nn.Conv2d(c, d, 1, bias=False), nn.BatchNorm2d(d))

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)) + self.shortcut(x)).relu()


class AtrousPyramid(nn.Module):
    """(n, c, y, x) -> (n, 1, y, x): a 1 × 1 and parallel atrous convolutions and the image's mean, joined (DeepLab's ASPP)."""

    def __init__(self, c: int, rates: Sequence[int]):
        super().__init__()
        self.branches = nn.ModuleList([_normed(c, c, size=1), *(_normed(c, c, rate=r) for r in rates)])
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1), nn.ReLU())
        self.join = _normed((len(rates) + 2) * c, c, size=1)
        self.out = nn.Conv2d(c, 1, 1)
        nn.init.zeros_(self.out.weight)  # nothing is added to the map before anything is learnt
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        parts.append(self.whole(x).expand(-1, -1, *x.shape[2:]))
        return self.out(self.join(torch.cat(parts, 1)))


def _normed(c: int, d: int, *, size: int = 3, rate: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c, d, size, padding=rate * (size // 2), dilation=rate, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(d), nn.ReLU())


def _resized(x: Tensor, side: int) -> Tensor:
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def focal_and_l1(logits: Tensor, masks: Tensor, how: RefinementConfig) -> Tensor:
    """Focal loss + L1 (Appendix D), means over all pixels. logits: (n, S, S) float, masks: (n, S, S) bool -> ().

    focal = -(1 - p_t)^γ log p_t, p_t the probability of what the mask says; L1 = |probability - mask|.
    """
    signed = torch.where(masks, logits, -logits)
    wrong = torch.sigmoid(-signed)  # 1 - p_t, which is also the L1 distance
    focal = -(wrong**how.focal_gamma * F.logsigmoid(signed)).mean()
    return how.focal_weight * focal + how.l1_weight * wrong.mean()
