"""Greedy k-center on real features: ours against anomalib's KCenterGreedy and against a plain loop, with identical picks counted."""

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import peers
import torch
from alone import alone, forget_highest, mib, seconds
from common import arguments, write

from rcp import PatchCore
from rcp.coreset import coreset_size, greedy_k_center
from rcp.data import load_dataset, load_images
from rcp.patches import pool
from reproduce.notebook import environment

CHUNK = 2048  # rows whose differences stay in the cache


def extract(options, path: Path) -> int:
    """Writes PatchCore's (N, 512) float32 features of the training images to ``path``; -> N."""
    sizes = {224: 256, 320: 366, 480: 512}
    detector = PatchCore(
        backbone=options.backbone,
        weights=options.weights,
        image_size=options.size,
        resize=sizes[options.size],
        device="cpu",
    )
    images = load_images(load_dataset(options.data, category=options.category).train.paths, detector.transform)
    found = torch.from_numpy(detector.extractor(images))
    n, patches, _ = found.shape
    out = np.lib.format.open_memmap(path, "w+", np.float32, (n * patches, 512))
    for i, p in enumerate(found):
        out[i * patches : (i + 1) * patches] = pool(p.float(), 512)
    return len(out)


def ours(path: Path, count: int):
    """-> (seconds, picks, memory before)"""
    features = torch.from_numpy(np.load(path))
    greedy_k_center(features[:3000].clone(), 30)  # what is compiled, is compiled
    before = forget_highest()
    took, picks = seconds(greedy_k_center, features, count)
    return took, picks.tolist(), before


def plain(path: Path, picks: list[int]):
    """The algorithm as it is, each pick compared with every patch by differences, in one pass over the features per pick.

    It goes along ``picks`` and says at each what it would have picked: where that is always the same, so is the whole run.
    -> (seconds, (number of the same picks, the largest share by which another is nearer, in squared distance), memory before)
    """
    features = torch.from_numpy(np.load(path))
    buffer = torch.empty(CHUNK, features.shape[1])
    before = forget_highest()

    def loop():
        near = torch.full((len(features),), torch.inf)
        same, short = 1, 0.0
        for pick, following in pairwise(picks):
            for part, nearest in zip(features.split(CHUNK), near.split(CHUNK), strict=True):
                d2 = torch.sub(part, features[pick], out=buffer[: len(part)]).square_().sum(1)
                torch.minimum(nearest, d2, out=nearest)
            near[pick] = -1  # never again
            farthest, own = near.max(0)
            same += own.item() == following
            short = max(short, 1 - (near[following] / farthest).item())
        return same, short

    return *seconds(loop), before


def peer(path: Path, count: int, picks: int):
    features = torch.from_numpy(np.load(path))
    before = forget_highest()
    return *peers.k_center(features, count, picks), before


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=224, choices=(224, 320, 480), help="pixels of an image")
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--peer-picks", type=int, default=100, help="that anomalib is timed for; 0 is all")
    parser.add_argument("--plain-picks", type=int, default=2000, help="that the plain loop is run for; 0 is all")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        n, _ = alone(extract, options, path)
        count = coreset_size(options.ratio, n)
        peer_picks, plain_picks = (min(picks or count, count) for picks in (options.peer_picks, options.plain_picks))
        (took, picks, before), memory = alone(ours, path, count)
        (plain_took, (same, short), plain_before), plain_memory = alone(plain, path, picks[:plain_picks])
        (peer_took, peer_all, peer_before), peer_memory = alone(peer, path, count, peer_picks)

    found = f"{same:,} of {plain_picks:,}"
    if same < plain_picks:
        found += f"; the others nearer by {short:.0e} at most"
    plain_all = plain_took * (count - 1) / (plain_picks - 1)
    rows = [
        [name, picked, f"{s:.2f}", f"{all_:.1f}", f"**{all_ / took:.1f}×**", check, mib(m.highest - b.resident), mib(m.highest)]
        for name, picked, s, all_, check, m, b in (
            ("ours", count, took, took, found, memory, before),
            ("plain loop", plain_picks, plain_took, plain_all, "", plain_memory, plain_before),
            ("anomalib KCenterGreedy", peer_picks, peer_took, peer_all, "", peer_memory, peer_before),
        )
    ]  # fmt: skip
    write(
        f"coreset_{options.category}_{options.size}",
        f"Coreset: {count:,} of {n:,} × 512 features, {options.category}, {options.backbone}, {options.size} px",
        ["what", "picks timed", "seconds", f"seconds for {count:,}", "ratio to ours", "picks that are the plain loop's",
         "peak MiB beyond the features", "peak resident MiB in all"],
        rows,
        "The plain loop goes along our picks and says what it would have picked; near-ties within float32's rounding (6e-8) go either way. "
        "Each in a process of its own that starts with the features in memory (float32); compiled code is compiled beforehand. Where "
        "fewer picks were timed, each further one is counted at the same price. anomalib compares a random projection of the features, "
        f"to {int(4 * np.log(n) / 0.162)} dimensions. {environment('cpu')}",
    )  # fmt: skip
