"""What holding patch features in half precision does to AUROC, against single precision in the same run.

Tiny changes send the greedy picks elsewhere, and other picks move the result; so a single pair of runs shows nothing. Each
precision is run from the same several random starts, and the difference is judged against their spread.
"""

import numpy as np
from common import arguments, write

from rcp.config import Config
from reproduce.entries import Entry
from reproduce.notebook import environment
from reproduce.run import run
from reproduce.store import Store, runs_root

parser = arguments(__doc__.splitlines()[0])
parser.add_argument("--starts", type=int, default=10)
options = parser.parse_args()
base = Config(representation="none", backbone=options.backbone, weights=options.weights, calibration_folds=0)
NAMES = ("image_auroc", "pixel_auroc", "aupro")


def measure(**changes) -> list[float]:
    entry = Entry(base.replace(**changes), options.data, options.category)
    result = run(entry, Store(runs_root()))
    return [100 * result.metrics[name] for name in NAMES]


rows, found = [], {}
for dtype in ("float32", "float16"):
    default = measure(feature_dtype=dtype)
    found[dtype] = np.array(
        [measure(feature_dtype=dtype, coreset_start="random", seed=s) for s in range(options.starts)]
    )
    rows.append([dtype, "farthest from the mean", *(f"{v:.2f}" for v in default)])
    spread = zip(found[dtype].mean(0), found[dtype].std(0, ddof=1), strict=True)
    rows.append([dtype, f"{options.starts} random starts", *(f"{mean:.2f} ± {sd:.2f}" for mean, sd in spread)])
paired = found["float16"] - found["float32"]
error = paired.std(0, ddof=1) / options.starts**0.5
rows.append(
    [
        "difference",
        "mean ± its standard error",
        *(f"{m:+.2f} ± {e:.2f}" for m, e in zip(paired.mean(0), error, strict=True)),
    ]
)
write(
    f"feature_precision_{options.category}",
    f"Precision of the stored features: PatchCore, {options.category}, {options.backbone}",
    ["feature_dtype", "start", "image AUROC", "pixel AUROC", "AU-PRO"],
    rows,
    f"In percent; ± is the standard deviation over the starts. {environment('cpu')}",
)
