"""Inference: one pass split by stage, at batch 1 and 32, CNN in float32 and bfloat16, beside anomalib's PatchCore with as large a bank."""

import itertools

import numpy as np
import peers
from alone import alone
from common import arguments, write

from rcp import PatchCore, ReConPatch
from rcp.data import load_dataset, load_images
from reproduce.notebook import environment
from reproduce.studies import inference_seconds


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-peer", action="store_true", help="anomalib is not there")
    options = parser.parse_args()

    dataset = load_dataset(options.data, category=options.category)
    backbones = [(options.backbone, options.weights), ("wide_resnet50_2", "random:0")]
    rows = []
    for backbone, weights in backbones:
        theirs = {}  # batch -> seconds of the peer's passes, before and after ours
        for cls, dtype in itertools.product((PatchCore, ReConPatch), ("float32", "bfloat16")):
            detector = cls(
                backbone=backbone,
                weights=weights,
                backbone_dtype=dtype,
                epochs=1,
                calibration_folds=0,
                device=options.device,
            )
            detector.fit(dataset.train, log=len)
            train, test = (load_images(part, detector.transform) for part in (dataset.train[:40], dataset.test))
            for batch in options.batches:
                images = test[np.arange(batch) * len(test) // batch]  # good and defective ones
                # the peer's passes before and after ours in float32: whatever else the machine does, it does to both
                of_file = None if weights.startswith("random:") else weights
                job = (peers.inference, backbone, of_file, len(detector.bank_.entries), train, images, 15)
                beside = cls is PatchCore and dtype == "float32" and not options.no_peer
                if beside:
                    theirs[batch] = alone(*job)[0]
                split = inference_seconds(detector, images)
                if beside:
                    theirs[batch] += alone(*job)[0]
                ms = {stage: np.median(s) * 1e3 / batch for stage, s in split.items()}
                spread = np.subtract(*np.percentile(split["all"], [75, 25])) * 1e3 / batch
                share = (ms["search"] + ms["map"]) / ms["backbone"]
                peer = np.median(theirs[batch]) * 1e3 / batch if cls is PatchCore and theirs else None
                rows.append([backbone, dtype, cls.__name__, batch, *(f"{ms[s]:.2f}" for s in list(split)[1:])])
                rows[-1] += [f"{ms['all']:.2f} ± {spread:.2f}", f"{1e3 / ms['all']:.0f}", f"{share:.0%}"]
                rows[-1] += [f"{peer:.2f}", f"**{peer / ms['all']:.1f}×**"] if peer else ["", ""]
                print(rows[-1], flush=True)
            bank = len(detector.bank_.entries)
    write(
        "inference",
        f"Inference, milliseconds per image: {options.category}, 224 px, bank of {bank:,} entries",
        ["backbone", "backbone_dtype", "method", "batch", "backbone", "features", "f", "search", "map", "all ± IQR", "images/s",
         "search + map, of backbone", "anomalib, all", "ratio"],
        rows,
        "Medians of 30 passes after 10 warm-ups, decoding left out; search is Eq. 9 and 10. anomalib's PatchcoreModel alone, on "
        "normalised images, with the same CNN and as many entries (of its own size: all channels, 384 for resnet18, 1,536 for "
        "wide_resnet50_2; ours is 512 for both), in a process of its own, 15 passes before and 15 after ours in float32; it weights "
        "one patch per image, ours every patch, and its CNN works in float32. bfloat16 is an option of ours, of the CNN alone; "
        "what it does to AUROC is in features.md. wide_resnet50_2 has random weights: times only. "
        f"{environment(options.device)}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
