"""Simulated anomalies per second, and where the time of an epoch of the refinement network goes (Appendix D)."""

import time

import numpy as np
from common import arguments, write

from rcp import ReConPatch
from rcp.data import Transform, load_dataset, load_images
from rcp.refinement import Refinement
from rcp.refinement.simulation import Simulation, load_textures, simulate
from reproduce.notebook import environment

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
        rows.append([f"simulation, {kind}", "within the object" if foreground else "anywhere", f"{rate:.0f} images/s"])

refine = Refinement.build(kind="structure", epochs=3)
detector = ReConPatch(backbone=options.backbone, weights=options.weights, epochs=1, refine=refine)
shown = load_images(list(data.train.paths), detector.transform)
p = detector.extractor(shown)
detector = ReConPatch.assemble(detector.config, detector.train(p, log=len)[0], p, refine=refine)
spent = {"seeing": 0.0}
make_maps = detector.extractor.__call__


def timed(images: np.ndarray, **options) -> np.ndarray:
    started = time.perf_counter()
    features = make_maps(images, **options)
    spent["seeing"] += time.perf_counter() - started
    return features


detector.extractor = timed
started = time.perf_counter()
detector.fit_refinement(shown, log=len)
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
    f"Simulation: {len(images)} images of {options.side} px, three passes. Seeing: features of the "
    f"changed images. {environment(detector.device)}",
)
