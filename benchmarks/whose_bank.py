"""anomalib's PatchCore beside ours with ``aggregation="mean"``: what of a difference is the features', the scores', the bank's?"""

from unittest.mock import patch

import numpy as np
import torch
from common import arguments, write

from rcp import PatchCore, metrics
from rcp.backbone import normalize
from rcp.data import load_dataset, load_images
from rcp.detector import Prediction
from rcp.scoring import MemoryBank
from reproduce import grids, peers
from reproduce.notebook import Settings, environment

NAME = "PatchCore (anomalib)"


def percent(scored: Prediction) -> str:
    found = metrics.evaluate(scored, dataset.test)
    return f"{100 * found['image_auroc']:.2f} / {100 * found['pixel_auroc']:.2f}"


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    from anomalib.models.image.patchcore import torch_model

    where = {"data_root": options.data, "categories": (options.category,)}
    settings = Settings(profile="paper", backbone=options.backbone, weights=options.weights, seeds=(0,), **where)
    (peer,) = [p for p in grids.peers(settings, [NAME]) if p.name == NAME]
    dataset, built, rows = load_dataset(options.data, category=options.category), [], []
    how = {"backbone": options.backbone, "weights": options.weights, "coreset_ratio": 0.01, "aggregation": "mean"}
    how |= {"calibration_folds": 0, "feature_dtype": "float32", "device": "cpu"}
    ours = PatchCore(**how)
    train, test = (load_images(split, ours.transform) for split in (dataset.train, dataset.test))
    p, q = ours.extractor(train), ours.extractor(test)
    start = torch_model.PatchcoreModel.__init__
    kept = patch.object(
        torch_model.PatchcoreModel, "__init__", lambda self, *a, **k: (built.append(self), start(self, *a, **k))[1]
    )
    for seed in range(options.seeds):
        drawn = PatchCore(**how, coreset_start="random", coreset_projection=128, seed=seed)
        alone = percent(PatchCore.assemble(drawn.config, None, p).predict_features(q))
        torch.manual_seed(seed)
        with kept:
            predict = peers.anomalib(peer, train)
        theirs, model = Prediction(*predict(test), ours.transform, None), built[-1]
        with torch.inference_mode():
            maps = model.feature_extractor(normalize(torch.from_numpy(test[:4])).contiguous())
            pooled = model.generate_embedding({name: model.feature_pooler(m) for name, m in maps.items()})
        apart = np.abs(model.reshape_embedding(pooled).numpy() - q[:4].reshape(-1, q.shape[2])).max()
        ours.bank_ = MemoryBank(model.memory_bank.cpu(), ours.config.neighbours)
        rows.append([seed, alone, percent(theirs), percent(ours.predict_features(q)), f"{apart:.1e}"])
    write(
        f"whose_bank_{options.category}_{options.backbone}",
        f"anomalib's PatchCore beside ours: {options.category}, {options.backbone}, image / pixel AUROC, percent",
        [
            "seed",
            "ours, projected and started at random",
            "anomalib",
            "our scores with anomalib's bank",
            "features apart by",
        ],
        rows,
        f"1 % banks. {environment('cpu')}",
    )
