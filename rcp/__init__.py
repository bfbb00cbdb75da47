"""rcp: ReConPatch (WACV 2024), the method, thin and readable. The paper's tables and figures are in :mod:`reproduce`."""

__version__ = "0.1.0"

__all__ = ["Config", "PatchCore", "ReConPatch", "__version__", "load", "train"]

import os

# Threads that wait for work give their core away; torch reads it when it is imported. On two cores that another process keeps busy,
# bottle's fit took 124 s without and 28 s with it; 17 s idle, either way.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rcp import coreset, data, decision, maps, metrics, model, prediction, scoring
from rcp.checks import guard
from rcp.config import Config
from rcp.detector import PatchCore, ReConPatch, load
from rcp.refinement import simulation

# What users call has its arguments checked there; what calls itself many times a second has not.
for _owner, _names in (
    (coreset, "coreset_size random_selection greedy_k_center"),
    (data, "categories download load_dataset load_images"),
    (decision, "threshold false_alarms"),
    (maps, "score_maps center_and_deviation modified_z_score"),
    (metrics, "image_auroc pixel_auroc aupro f1_threshold normal_threshold d_prime"),
    (model, "train"),
    (prediction.Prediction, "maps_on_original boxes overlay save"),
    (scoring, "nearest_entries patch_scores image_scores"),
    (scoring.MemoryBank, "__init__"),
    (simulation, "simulate"),
    (
        ReConPatch,
        "from_config fit assemble fit_refinement predict predict_iter predict_features decide save export load",
    ),
):
    guard(_owner, *_names.split())
train = model.train
