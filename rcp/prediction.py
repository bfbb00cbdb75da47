"""What ``predict`` returns: scores, maps, decisions, and where on the original image they are."""

import csv
import html
import os
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from rcp.checks import check_fields, require
from rcp.data.images import Original, Transform, named_as_image, open_rgb
from rcp.files import hold
from rcp.paths import require_writable

# EXIF orientation -> (transpose, then mirror columns, then mirror rows): an upright array back to how its file stores it.
_STORED = {1: (0, 0, 0), 2: (0, 1, 0), 3: (0, 1, 1), 4: (0, 0, 1), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}  # fmt: skip


COLUMNS = ("path", "score", "defective", "threshold", "regions", "left", "top", "right", "bottom")  # of the table
# Rows below the first: a name need not be text, and may hold the end of a line.
AS_CSV = {"mode": "a", "header": False, "index": False, "errors": "surrogateescape", "quoting": csv.QUOTE_NONNUMERIC}


class Box(NamedTuple):
    """A region in which patches reach the threshold: pixels of the original image, right and bottom outside it; its highest score."""

    left: int
    top: int
    right: int
    bottom: int
    score: float


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """Scores of n images; ``out[i]`` is one of them, ``for one in out`` goes through them.

    scores: (n,) float32 image scores; higher is more anomalous, in units of feature distance; of a refined map, in [0, 1].
    maps: (n, S, S) float32 score maps at ``image_size``, or None; where refined, in [0, 1].
    transform: the resize and crop that were applied, for masks to go the same way.
    train_scores: (n_train,) float32, each training image scored against a bank made of other images (None without folds).
    patch_scores: (n, h, w) float32, what scores and maps are made of (Eq. 10).
    paths: of each image, or "image 3" where it came as pixels. originals: their sizes before resize and crop.
    threshold: an image is defective where its score is this or more; None where there is none, ``why`` says why.
    skipped: (name, reason) of the images that could not be read.
    """

    scores: np.ndarray
    maps: np.ndarray | None
    transform: Transform
    train_scores: np.ndarray | None
    patch_scores: np.ndarray | None = None
    paths: tuple[Path | str, ...] = ()
    originals: tuple[Original, ...] = ()
    threshold: float | None = None
    why: str = ""
    skipped: tuple[tuple, ...] = ()

    def __post_init__(self):
        check_fields(self)
        require("scores", np.ndim(self.scores) == 1 and np.isfinite(self.scores).all(), "finite (n,)", self.scores)
        names = ("maps", "patch_scores", "paths", "originals")
        sizes = {len(v) for name in names if (v := getattr(self, name)) is not None and len(v)}
        require(", ".join(names), sizes <= {len(self)}, f"one for each of {len(self)} scores", sizes)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, i: int) -> "Prediction":
        """The prediction of one image."""
        words = f"an image from 0 to {len(self) - 1}"
        require("i", isinstance(i, int | np.integer) and -len(self) <= i < len(self), words, i)
        part = slice(i, i + 1 or None)
        rows = {n: getattr(self, n)[part] for n in ("scores", "maps", "patch_scores") if getattr(self, n) is not None}
        return replace(self, **rows, paths=self.paths[part], originals=self.originals[part], skipped=())

    def __iter__(self) -> Iterator["Prediction"]:
        return (self[i] for i in range(len(self)))

    @property
    def defective(self) -> np.ndarray:
        """(n,) bool: score >= threshold. Raises ValueError, with the reason, where there is no threshold."""
        require("threshold", self.threshold is not None, "a decision's threshold", f"none: {self.why}")
        return self.scores >= self.threshold

    def maps_on_original(self, i: int, upright: bool = False) -> np.ndarray:
        """(H, W) float32: the map of image i on its own pixels, as its file stores them; NaN where the crop did not look.

        upright: as EXIF says it is to be seen, instead.
        """
        self._check(i)
        require("maps", self.maps is not None, "a prediction with maps", None)
        width, height, orientation = self.originals[i]
        left, top, right, bottom = (round(v) for v in self.transform.window(width, height))
        seen = Image.fromarray(self.maps[i]).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
        whole = np.full((height, width), np.nan, np.float32)
        inside = np.asarray(seen)[max(0, -top) : height - top, max(0, -left) : width - left]
        whole[max(0, top) : bottom, max(0, left) : right] = inside
        return whole if upright else _stored(whole, orientation)

    def boxes(self, i: int, upright: bool = False) -> list[Box]:
        """The regions of image i whose patches reach the threshold, highest score first: none where it is not defective.

        upright: in the image as EXIF says it is to be seen, instead of as its file stores it.
        """
        self._check(i)
        require("patch_scores", self.patch_scores is not None, "a prediction with patch scores", None)
        width, height, orientation = self.originals[i]
        hot = self.patch_scores[i] >= (self.threshold if self.threshold is not None else np.inf)
        left, top, right, bottom = self.transform.window(width, height)
        x, y = ((b - a) / n for a, b, n in ((left, right, hot.shape[1]), (top, bottom, hot.shape[0])))
        found = []
        regions, _ = ndimage.label(hot, np.ones((3, 3)))
        for number, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
            score = float(self.patch_scores[i][rows, columns][regions[rows, columns] == number].max())
            across = np.clip(np.rint(left + x * np.array([columns.start, columns.stop])), 0, width).astype(int)
            down = np.clip(np.rint(top + y * np.array([rows.start, rows.stop])), 0, height).astype(int)
            if not upright:
                transposed, mirrored, flipped = _STORED[orientation]
                across, down, size = (down, across, (height, width)) if transposed else (across, down, (width, height))
                across = size[0] - across[::-1] if mirrored else across
                down = size[1] - down[::-1] if flipped else down
            found.append(Box(*(int(v) for v in (across[0], down[0], across[1], down[1])), score))
        return sorted(found, key=lambda box: -box.score)

    def overlay(self, i: int, side: int = 800) -> Image.Image:
        """Image i upright, at most ``side`` pixels long, its map in red over grey, its boxes."""
        self._check(i)
        path, (width, height, _) = self.paths[i], self.originals[i]
        known = isinstance(path, Path)  # what came as pixels is not kept
        grey = open_rgb(path).convert("L").convert("RGB") if known else Image.new("RGB", (width, height), "#808080")
        require(str(path), grey.size == (width, height), f"the image that was scored, {width} x {height} px", grey.size)
        whole, low, high = self.maps_on_original(i, upright=True), float(self.maps[i].min()), float(self.maps[i].max())
        if self.threshold is not None:  # from grey to red around it
            low, high = 0.5 * self.threshold, 1.5 * self.threshold
        heat = np.nan_to_num(np.clip((whole - low) / max(high - low, 1e-12), 0, 1))
        grey.paste(Image.new("RGB", grey.size, "#d62728"), mask=Image.fromarray((170 * heat).astype(np.uint8)))
        grey.thumbnail((side, side))
        draw, scale = ImageDraw.Draw(grey), grey.width / width  # frames after it is small: else they fade
        for box in self.boxes(i, upright=True):
            left, top, right, bottom = (round(scale * v) for v in box[:4])
            place = left, top, max(left, right - 1), max(top, bottom - 1)
            draw.rectangle(place, outline="#ffd92f", width=max(1, min(grey.size) // 200))
        return grey

    def records(self) -> Iterator[dict]:
        """Of each image its path, score, defective (None without a threshold), threshold and boxes: what JSON can hold."""
        paths = self.paths or [f"image {i}" for i in range(len(self))]
        for i, (path, score) in enumerate(zip(paths, self.scores.tolist(), strict=True)):
            defective = None if self.threshold is None else score >= self.threshold
            found = self.boxes(i) if self.originals and self.patch_scores is not None else ()
            boxes = [box._asdict() for box in found]
            yield dict(path=str(path), score=score, defective=defective, threshold=self.threshold, boxes=boxes)

    def table(self):
        """DataFrame, see :func:`tabulated`."""
        return tabulated(self.records())

    def save(self, folder: str | Path) -> Path:
        """Writes FOLDER/predictions.csv and an overlay for every image, FOLDER/0001_NAME.jpg; -> the folder."""
        with results_folder(Path(folder), self.paths) as folder:
            self.table().to_csv(folder / "predictions.csv", **AS_CSV)
            # an image may be gone since: the table is there then
            for i in range(len(self.originals) if self.maps is not None else 0):
                self.save_overlay(folder, i, i + 1)
            return folder

    def save_overlay(self, folder: Path, i: int, number: int) -> None:
        """Writes FOLDER/NUMBER_NAME.jpg."""
        self.overlay(i).save(_picture(folder, self.paths[i], number), quality=90)

    def __repr__(self) -> str:
        if self.threshold is None:
            return f"Prediction({len(self)} images, no threshold: {self.why})"
        lost = f", {len(self.skipped)} unreadable" if self.skipped else ""
        return f"Prediction({len(self)} images, {int(self.defective.sum())} defective at {self.threshold:.4g}{lost})"

    def _repr_html_(self, most: int = 12) -> str:
        """A table of the most anomalous images with thumbnails, for notebooks, where a $ in a name is no formula."""
        rows = []
        for i in np.argsort(-self.scores)[:most] if self.paths else ():
            data, shown = BytesIO(), ""
            if self.maps is not None:
                self.overlay(int(i), 160).save(data, "PNG")
                shown = f'<img src="data:image/png;base64,{b64encode(data.getvalue()).decode()}">'
            decision = "" if self.threshold is None else "defective" if self.scores[i] >= self.threshold else "normal"
            cells = shown, html.escape("/".join(Path(self.paths[i]).parts[-2:])), f"{self.scores[i]:.4g}", decision
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        head = "<tr><th></th><th>image</th><th>score</th><th>decision</th></tr>" if rows else ""
        shown = f'<p>{html.escape(repr(self))}</p><table class="tex2jax_ignore mathjax_ignore">{head}{"".join(rows)}</table>'
        return shown.encode(errors="backslashreplace").decode()  # a name need not be text

    def _check(self, i: int) -> None:
        require("i", 0 <= i < len(self.originals), f"an image from 0 to {len(self.originals) - 1} of predict()", i)


@contextmanager
def results_folder(folder: Path, images: Iterable) -> Iterator[Path]:
    """The folder, made where it is not there, for one run alone to write in. What an earlier run wrote there goes.

    Raises ValueError where it holds one of the images: overlays would be scored with them; or another run writes there.
    """
    holding, table = {image.parent.resolve() for image in images if isinstance(image, Path)}, folder / "predictions.csv"
    require("out", folder.resolve() not in holding, "another folder than that of the images", str(folder))
    require("out", folder.is_dir() or not os.path.lexists(folder), "a folder, or a new name", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    ours = table.exists() or not any(map(named_as_image, folder.iterdir()))
    require("out", ours, "a new folder, or one of results, with no other images", str(folder))
    require_writable(table, "write {} in", b"path,score,defective,threshold")
    with table.open("a+", newline="", errors="surrogateescape") as file:
        require("out", hold(file.fileno()) is not False, "a folder that no other run writes in", str(folder))
        file.seek(0)
        with suppress(csv.Error, ValueError):  # no longer a table
            for number, row in enumerate(csv.reader(file)):  # of an earlier run: its pictures go, and none else
                _picture(folder, "".join(row[:1]), number).unlink(missing_ok=True)
        table.write_text(f"{','.join(COLUMNS)}\n")  # a run that is killed leaves a folder that the next one knows
        yield folder


def _picture(folder: Path, path: Path | str, number: int) -> Path:
    """FOLDER/NUMBER_NAME.jpg, of the name no more than fits beside a number: 60 characters of up to 4 bytes, of 255."""
    return folder / f"{number:04d}_{Path(path).stem[:60].replace(' ', '_')}.jpg"


def tabulated(records: Iterable[dict]):
    """DataFrame of path, score, defective (missing without a threshold), the number of regions, and the box of the highest."""
    import pandas as pd

    sides, of = COLUMNS[5:], ((r, r["boxes"]) for r in records)
    rows = [r | {"regions": len(b)} | {s: b[0][s] if b else None for s in sides} for r, b in of]
    table = pd.DataFrame(rows, columns=COLUMNS)
    # else a spreadsheet computes it
    table["path"] = ["./" * p.startswith(tuple("=+-@\t\r")) + p for p in table["path"]]
    return table.astype({"defective": "boolean", **dict.fromkeys(sides, "Int64")})


def _stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    transposed, mirrored, flipped = _STORED[orientation]
    return np.ascontiguousarray((upright.T if transposed else upright)[:: 1 - 2 * flipped, :: 1 - 2 * mirrored])
