"""What ``rcp fit`` decides on real images: false alarms on test/good beside the interval that was promised, and defects found."""

import numpy as np
from common import arguments, write

from rcp import Config, ReConPatch
from rcp.data import categories, load_dataset
from rcp.decision import false_alarms
from rcp.metrics import image_auroc
from reproduce.notebook import environment

parser = arguments(__doc__)
parser.add_argument("--categories", nargs="+", help="some of them; all where left out")
parser.add_argument("--rate", type=float, default=0.05)
options = parser.parse_args()

rows = []
for name in options.categories or categories(options.data):
    data = load_dataset(options.data, category=name)
    config = Config.for_inspection(backbone=options.backbone, weights=options.weights)
    detector = ReConPatch.from_config(config).fit(data.train)
    detector.false_alarm_rate = options.rate
    out, labels = detector.predict(data.test, maps=False), data.test.labels
    good, bad = (np.asarray(out.defective)[labels == label] for label in (0, 1))
    low, high = false_alarms(len(data.train), options.rate, len(good))
    rows.append([
        name, len(data.train), f"{good.sum()} of {len(good)} ({good.mean():.1%})", f"{low:.1%} to {high:.1%}",
        f"{bad.sum()} of {len(bad)}", f"{100 * image_auroc(labels, out.scores):.2f}",
    ])  # fmt: skip
write(
    f"false_alarms_{options.backbone}",
    f"Decisions at a false-alarm rate of {options.rate:.0%}, {options.backbone}, preset for own images, nothing cropped",
    ["category", "held out", "false alarms", "promised (95 %)", "defects found", "image AUROC, %"],
    rows,
    f"The threshold is of held-out training images alone. {environment('cpu')}",
)
