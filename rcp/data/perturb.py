"""The perturbations of Appendix C.1: what an uncontrolled environment does to an image (Tables 4 and S5)."""

import dataclasses
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from rcp.checks import check_fields, limited
from rcp.data.images import Transform


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """Ranges of Appendix C.1. The paper names the five kinds [P] and, in its text as it is at hand, no range: all [I].

    Applied to the resized image, before the centre crop, in this order; each is drawn anew for every image.

    rotation: degrees, from [-rotation, rotation].
    translation: share of the side, both axes, from [-translation, translation].
    brightness, contrast: factor, from [1 - x, 1 + x].
    blur: σ of the Gaussian in pixels of the resized image, from [0, blur].
    border: what comes into view at the border: the "edge" pixels go on, or "black".
    seed: of the draw, together with the image's name (from its split's folder on, at most two folders), so that neither order nor place
        matters.

    Raises:
        ValueError: a value outside its range, named.
    """

    rotation: float = limited(10.0, least=0, most=180)
    translation: float = limited(0.05, least=0, most=1)
    brightness: float = limited(0.2, least=0, most=1)
    contrast: float = limited(0.2, least=0, most=1)
    blur: float = limited(1.0, least=0, most=100)
    border: Literal["edge", "black"] = "edge"
    seed: int = limited(0, least=0)

    def __post_init__(self):
        check_fields(self)

    def draw(self, image: str | Path) -> dict[str, float]:
        """The five values for one image: rotation (degrees), dx, dy (shares), brightness, contrast (factors), blur (pixels)."""
        parts = Path(image).absolute().with_suffix("").parts[-3:]
        split = max((i for i, part in enumerate(parts[:-1]) if part in ("train", "test")), default=0)
        name = "/".join(parts[split:])
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        rotation, dx, dy, brightness, contrast = rng.uniform(-1, 1, 5)
        return {
            "rotation": self.rotation * rotation, "dx": self.translation * dx, "dy": self.translation * dy,
            "brightness": 1 + self.brightness * brightness, "contrast": 1 + self.contrast * contrast,
            "blur": self.blur * rng.uniform(),
        }  # fmt: skip


@dataclass(frozen=True)
class PerturbedTransform(Transform):
    """Resize, perturb, crop. A mask moves as its image does."""

    perturbation: Perturbation = dataclasses.field(default_factory=Perturbation)

    @classmethod
    def of(cls, transform: Transform, perturbation: Perturbation) -> "PerturbedTransform":
        """``transform`` with a perturbation between its resize and its crop."""
        return cls(**dataclasses.asdict(transform), perturbation=perturbation)

    def _image(self, image: Image.Image, path: str | Path) -> Image.Image:
        drawn = self.perturbation.draw(path)
        image = self._moved(image, drawn, Image.Resampling.BILINEAR)
        image = ImageEnhance.Brightness(image).enhance(drawn["brightness"])
        image = ImageEnhance.Contrast(image).enhance(drawn["contrast"])
        return image.filter(ImageFilter.GaussianBlur(drawn["blur"])) if drawn["blur"] > 0 else image

    def _mask(self, mask: Image.Image, of: str | Path) -> Image.Image:
        return self._moved(mask, self.perturbation.draw(of), Image.Resampling.NEAREST, background=True)

    def _moved(self, image: Image.Image, drawn: dict, resample: Image.Resampling, background=False) -> Image.Image:
        """Turned about the centre, then shifted. What comes into view at a mask's border is background."""
        width, height = image.size
        margin = 0
        if self.perturbation.border == "edge" and not background:
            margin = int(np.ceil(np.hypot(width, height) * (0.5 + self.perturbation.translation)))
            image = Image.fromarray(np.pad(np.asarray(image), [(margin, margin)] * 2 + [(0, 0)], mode="edge"))
        shift = (round(drawn["dx"] * width), round(drawn["dy"] * height))
        centre = (image.size[0] / 2, image.size[1] / 2)
        image = image.rotate(drawn["rotation"], resample, center=centre, translate=shift)
        return image.crop((margin, margin, margin + width, margin + height))
