"""Resident memory while ``predict_iter`` scores a stream of images: what it holds after the first 500 must not grow."""

import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from alone import held
from common import arguments, write
from PIL import Image

from rcp import PatchCore
from rcp.data import load_dataset
from reproduce.notebook import environment

WARM = 500

if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    options = parser.parse_args()
    dataset = load_dataset(options.data, category=options.category)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i:03}.png" for i in range(len(dataset.test))]
        for path, file in zip(dataset.test.paths, files, strict=True):
            Image.open(path).convert("RGB").resize((224, 224)).save(file)
        detector = PatchCore(backbone=options.backbone, weights=options.weights, device="cpu", calibration_folds=0).fit(
            dataset.train
        )
        rows, began = [], time.perf_counter()
        for done, _ in enumerate(detector.predict_iter(islice(cycle(files), options.images)), 1):
            if done == WARM or done % 2_500 == 0:
                now = held().resident / 2**20
                rows.append([done, f"{now:.0f}", f"{now - float(rows[0][1]):+.0f}" if rows else "+0"])
                print(*rows[-1], flush=True)
    each = 1e3 * (time.perf_counter() - began) / options.images
    write(
        "stream",
        f"predict_iter over {options.images:,} images of 224 px, {options.backbone}",
        ["images", "resident, MiB", f"since {WARM}"],
        rows,
        f"{each:.0f} ms an image, beside other work. {environment('cpu')}",
    )
