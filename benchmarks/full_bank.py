"""Exact search in a bank of all training patches, beside the CNN's own time, for every test image by itself."""

import numpy as np
from common import arguments, write

from rcp import ReConPatch
from rcp.data import load_dataset, load_images
from reproduce.notebook import environment
from reproduce.studies import inference_seconds

STAGES = ("backbone", "features", "f", "search")

if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=1, help="of f; 0: f as it was drawn")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    dataset = load_dataset(options.data, category=options.category)
    how = {"epochs": options.epochs} if options.epochs else {"representation": "random"}
    how |= {"backbone": options.backbone, "weights": options.weights, "device": options.device}
    detector = ReConPatch(coreset_ratio=1.0, dim=512, calibration_folds=0, **how).fit(dataset.train)
    images = load_images(dataset.test, detector.transform)
    inference_seconds(detector, images[:8], 1, 0)
    split = [inference_seconds(detector, images[i : i + 1], 0, 1) for i in range(len(images))]
    seconds = np.array([[float(one[name][0]) for name in STAGES] for one in split])
    labels, rows = dataset.test.labels.astype(bool), []
    for name, some in (("all", np.ones_like(labels)), ("normal", ~labels), ("defective", labels)):
        means = 1e3 * seconds[some].mean(0)
        rows.append([name, int(some.sum()), *(f"{m:.1f}" for m in means), f"**{means[3] / means[0]:.2f}×**"])
    entries, dim = detector.bank_.entries.shape
    write(
        f"full_bank_{options.category}_{options.backbone}",
        f"Exact search among {entries:,} × {dim}, {options.category}, {options.backbone}, milliseconds an image",
        ["test images", "number", *STAGES, "search / backbone"],
        rows,
        f"Each test image by itself, once; means. f: {how.get('representation', f'trained, epochs: {options.epochs}')}. "
        "An image is searched the longer the farther its patches lie from the bank. "
        f"{environment(options.device)}",
    )
