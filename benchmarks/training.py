"""One training step (Sec. 3.2) against its literal transcription with autograd (tests/rcp/literal.py), same run, same batches."""

import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from common import arguments, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "rcp"))
import literal

from rcp.config import Config
from rcp.data import load_dataset, load_images
from rcp.detector import ReConPatch
from rcp.model import Representation, mini_batches, train
from reproduce.notebook import environment

parser = arguments(__doc__)
parser.add_argument("--images", type=int, default=40, help="an epoch is shortened to their patches")
options = parser.parse_args()

detector = ReConPatch(backbone=options.backbone, weights=options.weights)
paths = load_dataset(options.data, category=options.category).train.paths[: options.images]
wide = torch.from_numpy(detector.extractor(load_images(paths, detector.transform))).to(detector.device)
n, patches, _ = wide.shape
rows = []
for features, projection in ((wide[..., ::2].contiguous(), 128), (wide[..., ::2].contiguous(), 512), (wide, 128)):
    c = Config(projection=projection, epochs=3)
    with torch.random.fork_rng():
        torch.manual_seed(c.seed)
        start = Representation(features.shape[-1], c).to(detector.device)
    drawn = torch.Generator().manual_seed(c.seed)
    batches = [batch.to(detector.device) for _ in range(c.epochs) for batch in mini_batches(n, patches, c, drawn)]
    steps = len(batches) // c.epochs
    training = literal.autograd_training(features.flatten(0, 1), batches, start, c)
    expected, slow = [], []
    for _ in range(c.epochs):
        started = time.perf_counter()
        expected.append(torch.stack(list(islice(training, steps))).mean().item())
        slow.append((time.perf_counter() - started) / steps)
    history = train(features, c, log=len)[1]
    quick = [row["seconds"] / steps for row in history]
    off = max(abs(row["loss"] / e - 1) for row, e in zip(history, expected, strict=True))
    slow, quick = np.median(slow), np.median(quick)
    rows.append(
        [
            features.shape[-1],
            c.dim,
            projection,
            f"{1e3 * slow:.1f}",
            f"{1e3 * quick:.1f}",
            f"**{slow / quick:.1f}×**",
            f"{off:.1e}",
        ]
    )
write(
    "training",
    f"Training: one step of {c.batch_size} patches, {options.category}, {options.backbone}",
    ["p", "f(p)", "z", "literal, ms", "ours, ms", "ratio", "largest relative difference of an epoch's loss"],
    rows,
    f"Median of {c.epochs} epochs of {steps} steps. p of 512 is every other feature of 1024. {environment(detector.device)}",
)
