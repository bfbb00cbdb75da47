"""The small demo set, written again in the exact layouts of BTAD and VisA."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image


def _images(demo: Path, category: str):
    """(split, kind, number of the kind, image, mask or None) of one category."""
    for file in sorted(demo.glob(f"{category}/*/*/*.png")):
        split, kind = file.parts[-3:-1]
        if split != "ground_truth":
            mask = demo / category / "ground_truth" / kind / f"{file.stem}_mask.png"
            kinds = sorted({f.parent.name for f in demo.glob(f"{category}/test/*/*.png")} - {"good"})
            number = kinds.index(kind) if kind != "good" else -1
            yield split, kind, number, Image.open(file), Image.open(mask) if mask.exists() else None


def write_btad(demo: Path, root: Path) -> Path:
    """01 to 03 with train/ok, test/{ok,ko}, ground_truth/ko: bmp and png mixed, masks of another extension, 03 is 800 × 600."""
    products = (
        ("01", "gear", "bmp", "png", (256, 256)),
        ("02", "fabric", "png", "png", (256, 256)),
        ("03", "gear", "bmp", "bmp", (800, 600)),
    )
    for product, category, extension, of_mask, size in products:
        for i, (split, kind, _, image, mask) in enumerate(_images(demo, category)):
            folder = root / product / split / ("ok" if kind == "good" else "ko")
            folder.mkdir(parents=True, exist_ok=True)
            image.resize(size).save(folder / f"{i:04d}.{'bmp' if product == '02' and i % 3 == 2 else extension}")
            if mask:
                (root / product / "ground_truth" / "ko").mkdir(parents=True, exist_ok=True)
                mask.resize(size, Image.Resampling.NEAREST).save(
                    root / product / "ground_truth" / "ko" / f"{i:04d}.{of_mask}"
                )
    return root


def write_visa(demo: Path, root: Path) -> Path:
    """split_csv/1cls.csv, CLASS/Data/{Images,Masks}/{Normal,Anomaly}; JPEG named .JPG; a mask holds the number of its kind, not 255."""
    rows = [("object", "split", "label", "image", "mask")]
    for category in ("gear", "fabric"):
        for i, (split, kind, number, image, mask) in enumerate(_images(demo, category)):
            folder, place = (
                ("Normal", "") if kind == "good" else ("Anomaly", f"{category}/Data/Masks/Anomaly/{i:03d}.png")
            )
            name = f"{category}/Data/Images/{folder}/{i:04d}.JPG"
            for file in filter(None, (name, place)):
                (root / file).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / name, "JPEG", quality=95)
            if place:
                Image.fromarray((np.asarray(mask) > 0).astype(np.uint8) * (1 + number)).save(root / place)
            rows.append((category, split, "normal" if kind == "good" else "anomaly", name, place))
    (root / "split_csv").mkdir()
    with open(root / "split_csv" / "1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root
