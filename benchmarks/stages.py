"""Seconds and peak memory per stage for one category, images to metrics, nothing from the store: the baseline to beat."""

from common import WatchedTimings, arguments, write

from rcp import PatchCore, ReConPatch
from rcp.data import load_dataset
from rcp.metrics import evaluate
from reproduce.notebook import environment

parser = arguments(__doc__)
parser.add_argument("--epochs", type=int, default=2, help="training is reported per epoch")
options = parser.parse_args()
data = load_dataset(options.data, category=options.category)

rows = []
for cls in (PatchCore, ReConPatch):
    detector = cls(backbone=options.backbone, weights=options.weights, epochs=options.epochs)
    detector.timings_ = fit = WatchedTimings()
    detector.fit(data.train)
    detector.timings_ = predict = WatchedTimings()
    out = detector.predict(data.test)
    with predict("metrics"):
        evaluate(out, data.test)
    for phase, timings in (("fit", fit), ("predict", predict)):
        for stage, seconds in timings.items():
            per = f"{seconds / options.epochs:.2f} per epoch" if stage == "training" else f"{seconds:.2f}"
            rows.append([cls.__name__, phase, stage, per, f"{timings.peak[stage] / 2**20:.0f}"])

write(
    f"stages_{options.category}",
    f"Stages: {options.category}, {options.backbone}, {detector.config.image_size} px, {detector.config.coreset_ratio:.0%} coreset",
    ["method", "phase", "stage", "seconds", "peak resident MiB"],
    rows,
    f"{len(data.train)} training and {len(data.test)} test images; calibration is the held-out threshold, no part of the method. "
    f"{environment(detector.device)}",
)
