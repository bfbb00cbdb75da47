"""Patch features beside the bare backbone: its CNN's forward time alone; and what bfloat16 does to both, and to AUROC."""

import time

import numpy as np
import torch
from common import arguments, write

from rcp import PatchCore
from rcp.backbone import normalize
from rcp.data import load_dataset, load_images
from rcp.metrics import evaluate
from rcp.patches import PatchExtractor
from reproduce.notebook import environment

parser = arguments(__doc__)
parser.add_argument("--device", default="cpu")
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--categories", nargs="+", default=["bottle", "transistor"], help="of the AUROC of bfloat16")
options = parser.parse_args()
device = torch.device(options.device)


def wait_and_time() -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


rows = []
for backbone, weights in ((options.backbone, options.weights), ("wide_resnet50_2", "random:0")):
    for dtype in ("float32", "bfloat16"):
        detector = PatchCore(backbone=backbone, weights=weights, backbone_dtype=dtype, device=options.device)
        extractor: PatchExtractor = detector.extractor
        dataset = load_dataset(options.data, category=options.category)
        decoded = load_images(dataset.train[:64], detector.transform)
        out = extractor(decoded)
        bare = {}
        for batch in (4, 16, 32):  # images are ready, nothing is kept: the forward pass alone
            parts = normalize(torch.from_numpy(decoded).to(device)).to(extractor.backbone_dtype).split(batch)
            bare[batch] = (parts, [])
        ours = []
        for _ in range(options.rounds):
            for parts, seconds in bare.values():
                started = wait_and_time()
                with torch.inference_mode():
                    for part in parts:
                        extractor.backbone(part)
                seconds.append(wait_and_time() - started)
            started = wait_and_time()
            extractor(decoded, out=out)
            ours.append(wait_and_time() - started)
        ms = {batch: np.median(s) * 1e3 / len(decoded) for batch, (_, s) in bare.items()}
        mine = np.median(ours) * 1e3 / len(decoded)
        rows.append([backbone, dtype, *(f"{v:.2f}" for v in ms.values()), f"{mine:.2f}"])
        rows[-1] += [f"**{mine / min(ms.values()):.2f}×**", f"{mine / ms[16]:.2f}×"]
        print(rows[-1], flush=True)
effect = []
for category in options.categories:
    dataset = load_dataset(options.data, category=category)
    for dtype in ("float32", "bfloat16"):
        for start, seeds in (("mean", [0]), ("random", range(3))):
            found = []
            for seed in seeds:
                detector = PatchCore(
                    backbone=options.backbone, weights=options.weights, backbone_dtype=dtype, device=options.device,
                    coreset_start=start, seed=seed, calibration_folds=0,
                )  # fmt: skip
                metrics = evaluate(detector.fit(dataset.train).predict(dataset.test), dataset.test)
                found.append([100 * metrics[m] for m in ("image_auroc", "pixel_auroc", "aupro")])
            mean, deviation = np.mean(found, 0), np.std(found, 0, ddof=1) if len(found) > 1 else [None] * 3
            entries = [
                f"{m:.2f}" + (f" ± {d:.2f}" if d is not None else "") for m, d in zip(mean, deviation, strict=True)
            ]
            effect.append(f"| {category} | {dtype} | {start} ({len(found)}) | " + " | ".join(entries) + " |")
            print(effect[-1], flush=True)
write(
    "features",
    f"Patch features beside the bare backbone, ms per image ({options.category}, 224 px, 64 images)",
    ["backbone", "backbone_dtype", "bare, batch 4", "batch 16", "batch 32", "features", "over fastest bare", "over batch 16"],
    rows,
    f"Medians of {options.rounds} rounds in turn. Features: uint8 images to checked half-precision p in memory; decoding left out. "
    "wide_resnet50_2 has random weights: times only.\n\n"
    f"What bfloat16 does to PatchCore's AUROC and AU-PRO ({options.backbone}):\n\n"
    "| category | backbone_dtype | coreset start (runs) | image AUROC | pixel AUROC | AU-PRO |\n|---|---|---|---|---|---|\n"
    + "\n".join(effect) + f"\n\n{environment(options.device)}",
)  # fmt: skip
