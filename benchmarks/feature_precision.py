"""What holding patch features in half precision does to AUROC, against single precision in the same run."""

from common import arguments, write

from rcp import experiment, paths
from rcp.config import Config
from rcp.experiment import Cell
from rcp.notebook import environment
from rcp.store import Store

options = arguments(__doc__).parse_args()
base = Config(represent=False, backbone=options.backbone, weights=options.weights, calibration_folds=0)
rows = []
for dtype in ("float32", "float16"):
    result = experiment.run(
        Cell(base.replace(feature_dtype=dtype), options.data, options.category), Store(paths.runs_root())
    )
    rows.append([dtype, *(f"{100 * result.metrics[name]:.4f}" for name in ("image_auroc", "pixel_auroc", "aupro"))])
write(
    f"feature_precision_{options.category}",
    f"Precision of the stored features: PatchCore, {options.category}, {options.backbone}",
    ["feature_dtype", "image AUROC", "pixel AUROC", "AU-PRO"],
    rows,
    f"In percent. {environment('cpu')}",
)
