"""PatchCore under several seeds, for each choice of the coreset's random projection and start: how much they alone move the result."""

import itertools

from common import arguments, write

from rcp.config import Config
from reproduce.entries import Entry
from reproduce.notebook import environment
from reproduce.run import run_grid
from reproduce.store import Store, runs_root

parser = arguments(__doc__)
parser.add_argument("--seeds", type=int, default=5)
options = parser.parse_args()

base = Config(
    representation="none",
    backbone=options.backbone,
    weights=options.weights,
    dim=512,
    coreset_ratio=0.01,
    calibration_folds=0,
)
variants = [
    {"coreset_projection": p, "coreset_start": s} for p, s in itertools.product((128, None), ("random", "mean"))
]
entries = [
    Entry(base.replace(**variant, seed=seed), options.data, options.category)
    for variant in variants
    for seed in range(options.seeds)
]
frame = run_grid(entries, Store(runs_root())).frame()
rows = []
for variant in variants:
    same = frame["coreset_start"] == variant["coreset_start"]
    projected = frame["coreset_projection"].notna() == (variant["coreset_projection"] is not None)
    image, pixel = (
        100 * frame.loc[same & projected, metric].astype(float) for metric in ("image_auroc", "pixel_auroc")
    )
    spread = [f"{v.mean():.2f} ± {v.std():.2f} ({v.min():.2f} to {v.max():.2f})" for v in (image, pixel)]
    rows.append([variant["coreset_projection"] or "none", variant["coreset_start"], *spread])
write(
    f"coreset_noise_{options.category}",
    f"Noise of the coreset alone: PatchCore, {options.category}, {options.backbone}, {options.seeds} seeds",
    ["projection", "start", "image AUROC: mean ± sd (range)", "pixel AUROC"],
    rows,
    f"In percent. Without a projection and with the start at the patch farthest from the mean nothing is drawn. {environment('cpu')}",
)
