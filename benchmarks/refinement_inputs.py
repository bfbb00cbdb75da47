"""What the refinement network should see (Appendix D leaves it open): gain over the unrefined map for each choice of ``inputs``.

All choices of a category and seed are trained on the same simulated defects, seen once by the same detector.
"""

import dataclasses

import numpy as np
from common import arguments, write

from rcp import ReConPatch, metrics, refinement
from rcp.data import load_dataset, load_images
from reproduce.notebook import environment
from rcp.refinement import Refinement, Seen

INPUTS = ("map", "image", "features", "map+image", "map+features", "map+features+image")
CHOICES = [{"inputs": inputs} for inputs in INPUTS] + [{"inputs": "map", "l1_weight": 1.0}]
METRICS = ("pixel_auroc", "aupro", "image_auroc")


class Cache:
    """What the detector saw, call by call: the choices are trained on the same images in the same order."""

    def __init__(self, see):
        self.see, self.kept, self.at = see, [], 0

    def __call__(self, images: np.ndarray, numbers) -> Seen:
        if self.at == len(self.kept):
            seen = self.see(images, numbers)
            self.kept.append(seen._replace(distances=seen.distances.half()))
        self.at += 1
        seen = self.kept[self.at - 1]
        return seen._replace(distances=seen.distances.float())


def gains(options, seed: int) -> list[list[float]]:
    """For each choice: refined minus unrefined of METRICS in percent points."""
    data = load_dataset(options.data, category=options.category)
    everything = Refinement.build(
        inputs=INPUTS[-1], kind=options.kind, textures=options.textures, epochs=options.epochs, seed=seed
    )
    detector = ReConPatch(
        backbone=options.backbone,
        weights=options.weights,
        epochs=options.detector_epochs,
        seed=seed,
        device=options.device,
        refine=everything,
    )
    textures = everything.load_textures(detector.config.image_size)
    train, test = (load_images(list(part.paths), detector.transform) for part in (data.train, data.test))
    detector.fit_features(detector.extractor(train), log=len)
    features = detector.extractor(test)
    unrefined = metrics.evaluate(detector.predict_features(features), data.test)
    center, deviation = refinement.center_and_deviation(detector.train_patch_scores_)
    cache = Cache(lambda changed, numbers: refinement.see(detector, detector.extractor(changed), numbers))
    found = []
    for choice in CHOICES:
        how, cache.at = dataclasses.replace(everything, **choice), 0
        detector.refine = everything  # what the cache keeps has all parts, whichever choice comes first
        detector.refiner_, _ = refinement.train(
            train,
            cache,
            how,
            (center, how.beta * deviation),
            textures,
            len,
            device=detector.device,
            names=data.train.paths,
        )
        detector.refine = how
        refined = metrics.evaluate(detector.predict_features(features, images=test), data.test)
        found.append([100 * (refined[name] - unrefined[name]) for name in METRICS])
        detector.refiner_ = None
        print(options.category, seed, choice, [round(value, 2) for value in found[-1]], flush=True)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--kind", default="structure", help="of simulated defects: texture, structure or mixture")
    parser.add_argument("--textures", default="", help="DTD's folder, for texture and mixture")
    parser.add_argument("--epochs", type=int, default=12, help="of the refinement network; the paper: 500")
    parser.add_argument("--detector-epochs", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    runs = np.array([gains(options, seed) for seed in options.seeds])  # (seeds, choices, 3)
    rows = []
    for choice, of_seeds in zip(CHOICES, runs.swapaxes(0, 1), strict=True):
        name = choice["inputs"] + (f", L1 weight {choice['l1_weight']:g}" if "l1_weight" in choice else "")
        mean, sd = of_seeds.mean(0), of_seeds.std(0, ddof=min(1, len(of_seeds) - 1))
        row = [f"{m:+.2f} ± {s:.2f}" for m, s in zip(mean, sd, strict=True)]
        rows.append([name, *row, f"{(of_seeds[:, 0] > 0).sum()} of {len(of_seeds)}"])
    write(
        f"refinement_inputs_{options.category}_{options.kind}",
        f"What the refinement network sees: {options.category}, {options.backbone}, {options.kind}, {options.epochs} epochs, "
        f"{len(options.seeds)} seeds",
        ["inputs", "pixel AUROC", "AU-PRO", "image AUROC", "pixel AUROC rises in"],
        rows,
        "Refined minus unrefined, percent points, mean ± standard deviation over seeds (of detector and network); the detector is "
        f"trained for {options.detector_epochs} epochs. L1's weight is {Refinement().l1_weight:g} where not named; 1 is DeSTSeg's. "
        "Distances that a network with features is trained on are kept in half precision. These are test images: the default was "
        "chosen on them, so its gain is optimistic. "
        f"{environment(options.device)}",
    )


if __name__ == "__main__":
    main()
