"""From images to metrics: PatchCore against anomalib's fit + test; or, with --mvtec15, Table 5's models over 15 drawn categories."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import peers
from alone import alone, mib
from common import arguments, write
from PIL import Image
from scipy import ndimage

from rcp import PatchCore
from rcp.config import Config
from rcp.data import load_dataset
from rcp.detector import resolve_device
from rcp.metrics import evaluate
from reproduce.entries import Entry
from reproduce.notebook import environment
from reproduce.run import run
from reproduce.store import Store

# MVTec AD: images to train on, good and defective ones to test on
COUNTS = {
    "bottle": (209, 20, 63), "cable": (224, 58, 92), "capsule": (219, 23, 109), "carpet": (280, 28, 89), "grid": (264, 21, 57),
    "hazelnut": (391, 40, 70), "leather": (245, 32, 92), "metal_nut": (220, 22, 93), "pill": (267, 26, 141), "screw": (320, 41, 119),
    "tile": (230, 33, 84), "toothbrush": (60, 12, 30), "transistor": (213, 60, 40), "wood": (247, 19, 60), "zipper": (240, 32, 119),
}  # fmt: skip


def ours(data: str, category: str, backbone: str, weights: str, ratio: float) -> tuple[dict, dict, dict]:
    """-> (seconds of fit's stages, of predict's and the metrics, metrics). Whatever no stage covers is in "rest"."""
    dataset = load_dataset(data, category=category)
    phases = []
    started = time.perf_counter()
    detector = PatchCore(backbone=backbone, weights=weights, coreset_ratio=ratio, device="cpu").fit(dataset.train)
    phases.append(_with_rest(detector.timings_, started))
    detector.timings_.clear()
    started = time.perf_counter()
    prediction = detector.predict(dataset.test)
    with detector.timings_("metrics"):
        metrics = evaluate(prediction, dataset.test)
    phases.append(_with_rest(detector.timings_, started))
    return *phases, metrics


def _with_rest(timings: dict[str, float], started: float) -> dict[str, float]:
    return dict(timings) | {"rest": time.perf_counter() - started - sum(timings.values())}


def against_anomalib(options) -> None:
    job = (options.data, options.category, options.backbone, options.weights, options.ratio)
    alone(ours, *job[:-1], 1e-4)  # compiles what is compiled once per machine
    (fit, predict, metrics), memory = alone(ours, *job)
    size = Config(representation="none").resize, Config(representation="none").image_size
    (peer, areas), peer_memory = alone(peers.patchcore, *job, size, options.peer_as_shipped)
    rows = [["fit", stage, f"{s:.2f}", "", ""] for stage, s in fit.items()]
    rows += [["test", stage, f"{s:.2f}", "", ""] for stage, s in predict.items()]
    totals = {"fit": sum(fit.values()), "test": sum(predict.values())}
    compared = {
        "fit": (totals["fit"], peer["fit"]),
        "fit without calibration": (totals["fit"] - fit["calibration"], peer["fit"]),
        "test": (totals["test"], peer["test"]),
        "whole job": (sum(totals.values()), sum(peer.values())),
    }
    rows += [[name, "all", f"{a:.2f}", f"{b:.2f}", f"**{b / a:.1f}×**"] for name, (a, b) in compared.items()]
    rows.append(["memory", "peak resident MiB", mib(memory.highest), mib(peer_memory.highest), ""])
    for name in ("image", "pixel"):
        rows.append([f"{name} AUROC", "", f"{metrics[f'{name}_auroc']:.4f}", f"{areas[f'{name}_AUROC']:.4f}", ""])
    how = "as it ships" if options.peer_as_shipped else "at its leanest (image and pixel AUROC only, no validation)"
    write(
        f"whole_job_{options.category}",
        f"Whole job: PatchCore, {options.category}, {options.backbone}, {size[1]} px, {options.ratio:.2%} coreset",
        ["phase", "stage", "ours, seconds", "anomalib, seconds", "ratio"],
        rows,
        "From image files to metrics, each in a process of its own after imports, nothing from a store. Ours computes AU-PRO, F1 "
        "thresholds, d′ and, as calibration, held-out scores besides; "
        f"anomalib runs {how}, without logger, checkpoint or images. "
        f"{environment('cpu')}",
    )


def draw(root: Path, scale: float, side: int) -> None:
    """MVTec AD's categories by name and number of images: a pattern of its own for each, shifted, shaded and speckled anew each time."""

    def images(category: str):
        rng = np.random.default_rng(list(COUNTS).index(category))
        coarse = rng.normal(128, 40, (side // 16, side // 16, 3)).astype(np.float32)
        pattern = ndimage.zoom(coarse, (16, 16, 1), order=1, mode="grid-wrap")
        mask = np.zeros((side, side), bool)
        mask[side // 2 : side // 2 + side // 8, side // 3 : side // 2] = True
        folders = ("train/good", "test/good", "test/broken")
        for folder, count in zip(folders, COUNTS[category], strict=True):
            target = root / category / folder
            target.mkdir(parents=True)
            for i in range(max(2, round(scale * count))):
                image = np.roll(pattern, rng.integers(-20, 20, 2), (0, 1)) * np.float32(rng.uniform(0.9, 1.1))
                image[::2, ::2] += rng.normal(0, 6, image[::2, ::2].shape)
                if folder == "test/broken":
                    image[mask] = 255 - image[mask]
                    truth = root / category / "ground_truth/broken" / f"{i:03}_mask.png"
                    truth.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(truth)
                image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
                image.save(target / f"{i:03}.png", compress_level=1)

    with ThreadPoolExecutor() as pool:
        list(pool.map(images, COUNTS))


def fifteen(options) -> None:
    """PatchCore and ReConPatch on every category through the store, as table_5 runs them: features once for both."""
    rows, sums = [], {}
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "data", options.scale, options.side)
        methods = {
            name: Config(
                representation=representation, backbone=options.backbone, weights=options.weights, epochs=options.epochs
            )
            for name, representation in (("PatchCore", "none"), ("ReConPatch", "trained"))
        }
        started = time.perf_counter()
        for category in COUNTS:
            for name, config in methods.items():
                before = time.perf_counter()
                result = run(
                    Entry(config, str(Path(folder) / "data"), category),
                    Store(Path(folder) / "runs"),
                    log=lambda _: None,
                )
                took = time.perf_counter() - before
                split = result.info["seconds"]
                for stage, s in (split | {"rest": took - sum(split.values())}).items():
                    sums[name, stage] = sums.get((name, stage), 0) + s
                rows.append([category, name, f"{took:.1f}", f"{result.metrics['image_auroc']:.3f}"])
                print(*rows[-1], split, flush=True)
        total = time.perf_counter() - started
    rows = [[name, stage, f"{s:.1f}", f"{s / total:.0%}"] for (name, stage), s in sums.items()]
    rows.append(["both", "all", f"**{total:.1f}**", "100%"])
    write(
        "whole_job_mvtec15",
        f"Table 5's single model on 15 categories of MVTec AD's size: {options.backbone}, {options.epochs} epochs, "
        f"{options.scale:.0%} of the images",
        ["method", "stage", "seconds", "share"],
        rows,
        f"Drawn images of {options.side} px, so the time counts and no accuracy; features are computed once for both methods, "
        f"which PatchCore, the first, is charged for. {environment(resolve_device('auto'))}",
    )


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--ratio", type=float, default=0.01, help="of the coreset; a small one for a smoke test")
    parser.add_argument("--peer-as-shipped", action="store_true", help="with what anomalib does unless told not to")
    parser.add_argument("--mvtec15", action="store_true", help="15 drawn categories instead; --data is not read")
    parser.add_argument("--scale", type=float, default=1.0, help="--mvtec15: share of MVTec AD's images")
    parser.add_argument("--epochs", type=int, default=120, help="--mvtec15: of ReConPatch")
    parser.add_argument("--side", type=int, default=1024, help="--mvtec15: pixels of a drawn image")
    options = parser.parse_args()
    fifteen(options) if options.mvtec15 else against_anomalib(options)
