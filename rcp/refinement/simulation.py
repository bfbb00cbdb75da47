"""Simulated anomalies for the refinement network (Appendix D.2): normal images in, images with a defect and its mask out.

A mask is thresholded Perlin noise within the object; what shows there is another texture, or the image's own patches in another order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from scipy import ndimage

from rcp.checks import check_fields, limited, require
from rcp.data.images import IMAGE_SUFFIXES, Transform, load_images, named_as_image, threaded

TRIES = 8  # masks that are drawn before an image is given up and left as it is
DRAWN = 32  # textures where there are no images of any


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """How anomalies are simulated; the paper names the kinds [P] and takes the rest from MemSeg and DRAEM, so [I].

    kind: "texture" blends a texture in, "structure" the image's own grid cells in another order, "mixture" draws one of both.
    foreground: keep masks within the object where the background is plain and an object is found (see :func:`foreground`).
    tolerance, plain: of :func:`foreground`, in grey levels; 25 and 12.
    threshold: of the Perlin noise, which lies in [-1, 1]; 0.5.
    finest: cells of the noise along a side are drawn from 1, 2, 4, ... up to this; 4 (DRAEM draws up to 32: many small defects) [?].
    opacity: (least, most) share of what is blended in; (0.15, 1).
    grid: cells along a side that "structure" permutes; 8.
    anomalous: share of the images that get an anomaly; 1.
    seed: of all draws, together with the image's place and ``epoch``.

    Raises:
        ValueError: a value outside its range, named.
    """

    kind: Literal["texture", "structure", "mixture"] = "mixture"
    foreground: bool = True
    tolerance: float = limited(25.0, least=0)
    plain: float = limited(12.0, least=0)
    threshold: float = 0.5
    finest: int = 4
    opacity: tuple[float, ...] = (0.15, 1.0)
    grid: int = limited(8, least=2)
    anomalous: float = limited(1.0, least=0, most=1)
    seed: int = limited(0, least=0)

    def __post_init__(self):
        check_fields(self)
        require("threshold", -1 < self.threshold < 1, "a number between -1 and 1", self.threshold)
        require("finest", self.finest >= 1 and self.finest.bit_count() == 1, "a power of two", self.finest)
        shares = len(self.opacity) == 2 and 0 < self.opacity[0] <= self.opacity[1] <= 1
        require("opacity", shares, "(least, most), above 0 and up to 1", self.opacity)


def simulate(
    images: np.ndarray,
    simulation: Simulation,
    textures: np.ndarray | None = None,
    *,
    epoch: int = 0,
    numbers: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """images: (n, S, S, 3) uint8, normal -> (images (n, S, S, 3) uint8, masks (n, S, S) bool, True where a pixel was changed).

    Args:
        textures: (m, S, S, 3) uint8, of which "texture" and "mixture" draw.
        epoch, numbers: the draw follows ``simulation.seed``, the epoch and each image's number (its place where left out); nothing else.

    Raises:
        ValueError: no textures where they are needed, textures of another size, images smaller than the grid.
    """
    images = np.asarray(images)
    fits = images.ndim == 4 and images.shape[1:] == (images.shape[1], images.shape[1], 3) and images.dtype == np.uint8
    require("images", fits, "(n, S, S, 3) of uint8", (images.shape, images.dtype))
    check_side(images.shape[1], simulation)
    if simulation.kind != "structure":
        there = textures is not None and len(textures) > 0
        require("textures", there, f"images of textures (DTD) for kind={simulation.kind!r}", textures)
        found, needed = (textures.shape[1:], textures.dtype), (images.shape[1:], np.uint8)
        require("textures", found == needed, f"images of the shape {images.shape[1:]} of uint8", found)
    numbers = range(len(images)) if numbers is None else numbers
    require("numbers", len(numbers) == len(images), f"one of each of {len(images)} images", numbers)
    out, masks = images.copy(), np.zeros(images.shape[:3], bool)

    def one(i: int) -> None:
        rng = np.random.default_rng([simulation.seed, epoch, int(numbers[i])])
        if rng.random() >= simulation.anomalous:
            return
        mask = _mask(rng, images[i], simulation)
        if not mask.any():
            return
        kind = simulation.kind if simulation.kind != "mixture" else ("texture", "structure")[rng.integers(2)]
        source = _texture(rng, textures) if kind == "texture" else _permuted(rng, images[i], simulation.grid)
        opacity = np.float32(rng.uniform(*simulation.opacity))
        before = images[i][mask].astype(np.float32)
        after = np.rint(before + opacity * (source[mask] - before)).astype(np.uint8)
        out[i][mask] = after
        masks[i][mask] = (after != images[i][mask]).any(1)

    list(threaded(one, range(len(images))))
    return out, masks


def check_side(side: int, simulation: Simulation) -> None:
    """Raises ValueError where images of ``side`` pixels are smaller than the grid of "structure"."""
    require("images", side >= simulation.grid, f"at least {simulation.grid} px a side for as many cells", side)


def perlin(side: int, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Perlin noise of ``rows`` by ``columns`` cells: (side, side) float32 in [-1, 1]."""
    angle = rng.uniform(0, 2 * np.pi, (rows + 1, columns + 1)).astype(np.float32)
    (row, y), (column, x) = (_cells(side, n) for n in (rows, columns))

    def corner(down: int, right: int) -> np.ndarray:
        at = angle[np.ix_(row + down, column + right)]
        return np.sin(at) * (y - down)[:, None] + np.cos(at) * (x - right)[None]

    fade_y, fade_x = (t**3 * (t * (6 * t - 15) + 10) for t in (y[:, None], x[None]))
    upper, lower = (corner(d, 0) + fade_x * (corner(d, 1) - corner(d, 0)) for d in (0, 1))
    return np.sqrt(np.float32(2)) * (upper + fade_y * (lower - upper))


def _cells(side: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel of an axis: which cell it lies in, and where in it, in [0, 1)."""
    place = (np.arange(side, dtype=np.float32) + 0.5) * cells / side
    return place.astype(int), place - place.astype(int)


def _mask(rng: np.random.Generator, image: np.ndarray, simulation: Simulation) -> np.ndarray:
    """Thresholded, turned Perlin noise within the object, where one is found: (S, S) bool; empty if none fell on it."""
    side, allowed = len(image), np.True_
    if simulation.foreground and (found := foreground(image, simulation.tolerance, simulation.plain)).any():
        allowed = found
    scales = int(np.log2(min(simulation.finest, side))) + 1
    for _ in range(TRIES):
        rows, columns = 2 ** rng.integers(scales, size=2)
        noise = Image.fromarray(perlin(side, int(rows), int(columns), rng))
        turned = np.asarray(noise.rotate(rng.uniform(-90, 90), Image.Resampling.BILINEAR))
        mask = (turned > simulation.threshold) & allowed
        if mask.any():
            break
    return mask


def foreground(image: np.ndarray, tolerance: float = 25, plain: float = 12) -> np.ndarray:
    """Where the object is: (S, S, 3) uint8 -> (S, S) bool; everywhere where the background is not plain, nowhere where nothing stands out.

    The background is plain where the border of the image, apart from the quarter of its pixels that deviate most, keeps to one colour.

    Args:
        tolerance: grey levels from the background's colour from which on a pixel is the object's.
        plain: mean absolute deviation of the border, in grey levels, above which the background is not plain.
    """
    small = image[::4, ::4].astype(np.int16)
    border = np.concatenate([small[0], small[-1], small[1:-1, 0], small[1:-1, -1]])
    colour = np.median(border, 0)
    off = np.abs(border - colour).max(1)
    if np.sort(off)[: 3 * len(off) // 4].mean() > plain:
        return np.ones(image.shape[:2], bool)
    found = ndimage.binary_fill_holes(ndimage.binary_opening(np.abs(small - colour).max(2) > tolerance))
    if found.mean() < 0.01:
        return np.zeros(image.shape[:2], bool)
    return found.repeat(4, 0).repeat(4, 1)[: len(image), : len(image)]


def without_object(images: np.ndarray, simulation: Simulation) -> np.ndarray:
    """(n, S, S, 3) uint8 -> (n,) bool: where :func:`foreground` finds nothing before a plain background, so that a mask lies anywhere."""
    if not simulation.foreground:
        return np.zeros(len(images), bool)
    found = threaded(lambda p: foreground(p, simulation.tolerance, simulation.plain).any(), images)
    return ~np.fromiter(found, bool, len(images))


def _texture(rng: np.random.Generator, textures: np.ndarray) -> np.ndarray:
    """One of the textures, turned and mirrored at random: (S, S, 3)."""
    chosen = np.rot90(textures[rng.integers(len(textures))], rng.integers(4))
    return chosen[:, ::-1] if rng.integers(2) else chosen


def _permuted(rng: np.random.Generator, image: np.ndarray, grid: int) -> np.ndarray:
    """The image's grid cells in another order: (S, S, 3). Rows and columns left over, where S is no multiple of ``grid``, stay."""
    cell = len(image) // grid
    side, out = cell * grid, image.copy()
    cells = image[:side, :side].reshape(grid, cell, grid, cell, 3).swapaxes(1, 2)
    mixed = cells.reshape(-1, cell, cell, 3)[rng.permutation(grid * grid)].reshape(cells.shape)
    out[:side, :side] = mixed.swapaxes(1, 2).reshape(side, side, 3)
    return out


def texture_files(root: str | Path) -> list[Path]:
    """The images of a folder and those below it, sorted.

    Raises:
        FileNotFoundError: no such folder; names the command that fetches DTD.
        ValueError: a folder without images.
    """
    if not Path(root).is_dir():
        fetch = "name DTD's, or fetch it: python -m reproduce download dtd"
        raise FileNotFoundError(f"textures: no folder {root}; {fetch}")
    found = sorted(filter(named_as_image, Path(root).rglob("*")))
    require(f"textures: no images in {root}", len(found) > 0, f"{', '.join(IMAGE_SUFFIXES)} in it or below", found)
    return found


def load_textures(root: str | Path, side: int, count: int | None = None, seed: int = 0) -> np.ndarray:
    """DTD's ``images/CLASS/*.jpg``, or any folder of images, cropped to squares: (m, side, side, 3) uint8.

    count: as many, drawn by ``seed``; all where None. Raises as :func:`texture_files`.
    """
    found = texture_files(root)
    if count is not None and count < len(found):
        found = [found[i] for i in sorted(np.random.default_rng(seed).choice(len(found), count, replace=False))]
    return load_images(found, Transform(resize=side, image_size=side))


def draw_textures(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Made-up textures where DTD is not at hand (the demo): (count, side, side, 3) uint8."""
    out = np.empty((count, side, side, 3), np.uint8)
    for i, texture in enumerate(out):
        rng = np.random.default_rng([seed, i])
        rows, columns = 2 ** rng.integers(2, 7, size=2)
        noise = perlin(side, int(rows), int(columns), rng)
        bands = 0.5 + 0.5 * np.sin(rng.uniform(2, 20) * noise)[..., None]
        first, second = rng.uniform(0, 255, (2, 3))
        texture[:] = first + bands * (second - first)
    return out
