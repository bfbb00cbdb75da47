"""The preset for own images (``Config.for_inspection``) beside PatchCore with a bank of 1 %: AUROC on each category that is there."""

from common import arguments, write

from rcp.config import INSPECTION, NARROW, Config
from rcp.data import categories
from reproduce.entries import Entry
from reproduce.notebook import environment
from reproduce.run import run_grid
from reproduce.store import Store, runs_root
from reproduce.tables import paired

parser = arguments(__doc__)
parser.add_argument("--categories", nargs="+", help="some of them; all where left out")
options = parser.parse_args()

cnn = {"backbone": options.backbone, "weights": options.weights, "calibration_folds": 0}
presets = [Config.for_inspection(**cnn, seed=seed) for seed in range(3)]
configs = [Config(representation="none", dim=dim, **cnn) for dim in (512, 1024)] + presets
names = options.categories or categories(options.data)
grid = run_grid([Entry(c, options.data, name) for name in names for c in configs], Store(runs_root()))

rows = []
for dim in (512, 1024):
    against = paired(grid, (), {"representation": "whitened"}, {"representation": "none", "dim": dim})
    frame = grid.frame().set_index(["method", "dim", "category"]).sort_index()
    frame = frame[["image_auroc", "pixel_auroc"]].astype(float) * 100
    for r in against.to_dict("records"):
        of = [names] if r["row"] == "all" else [[r["row"]]]
        base, own = (frame.loc[where].loc[of[0]].mean() for where in (("PatchCore", dim), ("whitened", presets[0].dim)))
        shown = [f"{v.image_auroc:.2f} / {v.pixel_auroc:.2f}" for v in (base, own)]
        rows.append([f"PatchCore, D {dim}", r["row"], *shown, f"{r['mean']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}]"])
of_seeds = grid.frame().query("method == 'whitened'").groupby("seed")["image_auroc"].mean() * 100
given = INSPECTION | NARROW.get(options.backbone, {})
write(
    f"preset_{options.backbone}",
    f"The preset for own images beside PatchCore with a bank of 1 % and the paper's crop, {options.backbone}",
    ["against", "category", "PatchCore 1 %: image / pixel AUROC", "preset", "image AUROC: difference [95 % interval]"],
    rows,
    f"In percent; the preset, {given}, is a mean over three seeds of its coreset's projection (mean image AUROC "
    f"{', '.join(f'{v:.2f}' for v in of_seeds)}), PatchCore draws nothing. λ, the size of the neighbourhood and of the image, and for "
    f"ResNet-18 the mean, were chosen on these test images: optimistic for them. {environment('cpu')}",
)
