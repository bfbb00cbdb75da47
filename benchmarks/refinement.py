"""Simulated anomalies per second, and where the time of an epoch of the refinement network goes (Appendix D)."""

import time

import numpy as np
from common import arguments, write

from rcp import ReConPatch, refinement
from rcp.data import Transform, load_dataset, load_images
from reproduce.notebook import environment
from rcp.refinement import Refinement
from rcp.refinement.simulation import Simulation, load_textures, simulate

parser = arguments(__doc__)
parser.add_argument("--textures", required=True, help="DTD's folder")
parser.add_argument("--side", type=int, default=256, help="pixels of the images that are simulated")
options = parser.parse_args()
data = load_dataset(options.data, category=options.category)
images = load_images(list(data.train.paths), Transform(resize=options.side, image_size=options.side))
textures = load_textures(options.textures, options.side)

rows = []
for kind in ("texture", "structure", "mixture"):
    for foreground in (True, False):
        how = Simulation(kind=kind, foreground=foreground)
        simulate(images, how, textures)
        started = time.perf_counter()
        for epoch in range(3):
            simulate(images, how, textures, epoch=epoch)
        rate = 3 * len(images) / (time.perf_counter() - started)
        rows.append(
            [f"simulation, {kind}", "within the object" if foreground else "anywhere", f"{rate:.0f} images/s"]
        )

refine = Refinement.build(kind="structure", epochs=3)
detector = ReConPatch(backbone=options.backbone, weights=options.weights, epochs=1, refine=refine)
shown = load_images(list(data.train.paths), detector.transform)
detector.fit_features(detector.extractor(shown), log=len)
spent = {"seeing": 0.0}


def see(changed: np.ndarray, numbers) -> refinement.Seen:
    started = time.perf_counter()
    seen = refinement.see(detector, detector.extractor(changed), numbers)
    spent["seeing"] += time.perf_counter() - started
    return seen


started = time.perf_counter()
refinement.train(shown, see, refine, (0.0, 1.0), log=len)
whole = time.perf_counter() - started
started = time.perf_counter()
for epoch in range(refine.epochs):
    simulate(shown, refine.simulation, epoch=epoch)
spent["simulating"] = time.perf_counter() - started
spent["network"] = whole - sum(spent.values())
for what, seconds in spent.items():
    rows.append(
        [f"an epoch of {len(shown)} images, {what}", f"{shown.shape[1]} px", f"{seconds / refine.epochs:.2f} s"]
    )

write(
    f"refinement_{options.category}",
    f"Refinement: {options.category}, {options.backbone}",
    ["what", "where", "speed"],
    rows,
    f"Simulation: {len(images)} images of {options.side} px, three passes. Seeing: features, f, search and map of the changed "
    f"images. {environment(detector.device)}",
)
