"""Peak memory of fit for one category against the bytes of its stored features, at 224 and 480 px, both methods and both ways to fit."""

import tempfile
from pathlib import Path

import numpy as np
from alone import alone, forget_highest, mib
from common import WatchedTimings, arguments, write
from PIL import Image

from rcp.config import Config
from rcp.data import load_dataset
from rcp.detector import ReConPatch
from rcp.fast import kernels
from reproduce.entries import Entry
from reproduce.entries import fit as fit_from_store
from reproduce.notebook import environment
from reproduce.store import Store

RESIZE = {224: 256, 320: 366, 480: 512}
WAYS = {"fit": "fit(paths)", "store": "through the store"}


def fit(config: Config, folder: str, way: str):
    """-> (memory before, bytes of the stored features, stage of the highest resident memory)"""
    dataset = load_dataset(folder)
    detector = ReConPatch.from_config(config)
    h, w, dim = detector.extractor.shape()  # with the backbone
    kernels.threads()  # numba is imported by now, 90 MiB of compiler
    before = forget_highest()
    if way == "fit":
        detector.timings_ = WatchedTimings()
        detector.fit(dataset.train, log=lambda _: None)
        stage = max(detector.timings_.peak, key=detector.timings_.peak.get)
    else:
        fit_from_store(Entry(config, folder), dataset, Store(Path(folder) / "runs"))
        stage = ""
    return before, len(dataset.train) * h * w * dim * np.dtype(config.feature_dtype).itemsize, stage


def images(folder: Path, real: list[Path], count: int) -> None:
    """An own data set with ``count`` training images: the real ones, then again, turned by up to 3° and moved by up to 8 pixels."""
    rng = np.random.default_rng(0)
    for name in ("train", "test/good"):
        (folder / name).mkdir(parents=True)
    (folder / "test/good/000.png").symlink_to(real[0].resolve())
    for i in range(count):
        path = folder / f"train/{i:04}.png"
        if i < len(real):
            path.symlink_to(real[i].resolve())
        else:
            image = Image.open(real[i % len(real)]).convert("RGB")
            moved = np.pad(np.asarray(image), ((16, 16), (16, 16), (0, 0)), "edge")
            turned = Image.fromarray(moved).rotate(rng.uniform(-3, 3), Image.Resampling.BILINEAR)
            left, top = rng.integers(8, 24, 2)
            turned.crop((left, top, left + image.width, top + image.height)).save(path, compress_level=1)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 480], help="pixels of an image")
    parser.add_argument("--images", type=int, default=391, help="to fit on (hazelnut, MVTec AD's largest, has 391)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument(
        "--ratio", type=float, default=0.01, help="of the coreset; a small one saves time, and picks × 2 KiB"
    )
    options = parser.parse_args()
    real = list(load_dataset(options.data, category=options.category).train.paths)

    rows = []
    for size in options.sizes:
        for representation in ("none", "trained"):
            config = Config(
                representation=representation, backbone=options.backbone, weights=str(Path(options.weights).resolve()),
                epochs=options.epochs, coreset_ratio=options.ratio, image_size=size, resize=RESIZE[size], device="cpu",
            )  # fmt: skip
            for way in options.ways:
                with tempfile.TemporaryDirectory() as folder:
                    images(Path(folder), real, options.images)
                    (before, stored, stage), memory = alone(fit, config, folder, way)
                resident, anonymous = memory.highest - before.resident, memory.anonymous - before.anonymous
                method = "PatchCore" if representation == "none" else "ReConPatch"
                rows.append(
                    [size, method, WAYS[way], mib(stored), mib(resident), f"**{resident / stored:.2f}×**",
                     mib(anonymous), f"**{anonymous / stored:.2f}×**", mib(memory.highest), stage]
                )  # fmt: skip
                print(*rows[-1], flush=True)
    write(
        f"memory_{options.category}",
        f"Peak memory of fit: {options.images} images, {options.category}, {options.backbone}",
        ["px", "method", "fit", "stored features, MiB", "peak resident, MiB", "of the stored", "peak anonymous, MiB",
         "of the stored", "whole process, MiB", "stage of the peak"],
        rows,
        "Each in a process of its own. What it held once the imports were done and the backbone was built is subtracted, except from the "
        "whole process. Resident counts the pages of memory-mapped features, which the system can drop; anonymous (looked at every 5 ms) "
        f"does not. {min(len(real), options.images)} of the images are real, the others the same again, turned and moved a little. "
        f"{environment('cpu')}",
    )  # fmt: skip
