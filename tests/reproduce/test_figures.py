"""Figures: what they say is what the objects hold and what the metrics compute."""

from itertools import combinations

import literal
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from rcp import PatchCore, ReConPatch, metrics
from rcp.config import Config
from reproduce.figures import plots


def words(figure):
    return [t for axis in figure.axes for t in axis.texts if t.get_text()]


def said(figure):
    return "\n".join(t.get_text() for t in words(figure))


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(1, 0.2, 20), rng.normal(2, 0.4, 60)]), np.repeat([0, 1], [20, 60])


def detector(**changes):
    small = {
        "backbone": "resnet18",
        "weights": "random:0",
        "resize": 64,
        "image_size": 64,
        "device": "cpu",
        "epochs": 1,
    }
    return ReConPatch(**(small | changes))


def test_style_leaves_no_trace(scores):
    before = dict(plt.rcParams)
    with plots.style():
        assert plt.rcParams["savefig.dpi"] == 180
    plots.score_histogram({"PatchCore": scores})
    assert dict(plt.rcParams) == before
    assert not plt.get_fignums()  # an open figure would be shown twice in a notebook


def test_a_saved_figure_says_where_its_numbers_are_from(tmp_path, scores):
    figure = plots.score_histogram({"PatchCore": scores})
    plots.save(figure, tmp_path / "a", "bottle; resnet18, 10 epochs")
    assert figure.get_supxlabel() == "bottle; resnet18, 10 epochs"


def averages(rows):
    columns = pd.MultiIndex.from_product([["image AUROC"], ["mean", "spread", "paper, 15 categories", "difference"]])
    return pd.DataFrame(rows, index=[f"k {i}" for i in range(len(rows))], columns=columns)


def test_ablation_draws_ours_and_the_papers_for_each_table():
    table = averages([[99.0, 0.2, 99.5, -0.5], [98.0, np.nan, np.nan, np.nan]])
    figure = plots.ablation({"Table S1": table, "Table S2": table})
    assert [axis.get_title() for axis in figure.axes] == ["Table S1", "Table S2"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_array_equal(lines["paper, 15 categories"].get_ydata(), [99.5, np.nan])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["k 0", "k 1"]


def panel_texts(figure):
    return [[t.get_text() for t in axis.texts] for axis in figure.axes]


def test_ablation_draws_tables_that_leave_different_categories_out_and_one_that_is_empty():
    table = averages([[99.0, 0.2, 99.5, -0.5]])
    without = table.rename(columns={"image AUROC": "image AUROC (without carpet)"})
    figure = plots.ablation({"S1": table.iloc[:0], "S2": table, "S3": without})
    assert [axis.get_title() for axis in figure.axes] == ["S1", "S2", "S3"], "one row of panels for one metric"
    assert panel_texts(figure) == [[plots.NOTHING], [], ["without carpet"]]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["paper, 15 categories", "rcp"]


def test_a_figure_of_nothing_says_so():
    nothing = np.zeros((0, 1, 1), bool)
    for figure in (
        plots.ablation({"S1": averages([[99.0, 0.2, 99.5, -0.5]]).iloc[:0]}),
        plots.bank_memory(pd.DataFrame(columns=["method", "megabytes", "metric"])),
        plots.score_histogram({}),
        plots.score_maps(None, nothing, {}, {}, []),
        plots.score_map_sheet(None, nothing, nothing, [], []),
        plots.feature_space({}, np.zeros((1, 2), int)),
    ):
        assert panel_texts(figure) == [[plots.NOTHING]]


def test_a_sheet_has_a_image_and_a_map_of_each_on_its_own_scale():
    rng = np.random.default_rng(0)
    maps, masks = rng.random((3, 16, 16)) * np.array([1, 10, 100])[:, None, None], np.zeros((3, 16, 16), bool)
    masks[:, 2:5, 2:5] = True
    figure = plots.score_map_sheet(
        None, masks, maps, [0.5, None, 50.0], ["bottle: hole", "cable: cut", "grid: bent"], columns=2
    )
    panels = np.array(figure.axes).reshape(2, 2, 2)
    assert [axis.get_title() for axis in panels[:, 0].ravel()] == ["bottle: hole", "cable: cut", "grid: bent", ""]
    drawn = panels[:, 1].ravel()[:3]
    assert [axis.images[1].get_clim() for axis in drawn] == [(m.min(), m.max()) for m in maps]
    stars = [(axis.lines[0].get_ydata()[0], axis.lines[0].get_xdata()[0]) for axis in drawn]
    assert stars == [np.unravel_index(m.argmax(), m.shape) for m in maps]
    assert [len(axis.collections) for axis in drawn] == [2, 1, 2], "ground truth, and a threshold where there is one"


def test_bank_memory_is_auroc_against_megabytes():
    rows = [
        {
            "method": m,
            "megabytes": x,
            "metric": "image AUROC",
            "mean": 99 - x,
            "spread": 0.1,
            "paper, 15 categories": 99.5,
        }
        for m in ("PatchCore", "ReConPatch")
        for x in (2.0, 1.0)
    ]
    axis = plots.bank_memory(pd.DataFrame(rows)).axes[0]
    drawn = set(axis.get_legend_handles_labels()[1])
    assert axis.get_xscale() == "log" and {"PatchCore", "ReConPatch, paper, 15 categories"} <= drawn
    assert axis.lines[0].get_xdata().tolist() == [1.0, 2.0]


def test_feature_space_has_a_panel_per_space_and_a_key():
    positions = np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="ij"), -1).reshape(-1, 2)
    spaces = {"PatchCore": np.random.default_rng(0).normal(size=(16, 2)), "epoch 1": positions.astype(float)}
    figure = plots.feature_space(spaces, positions, {"epoch 1": "epoch 1: R² 1.000"})
    assert [axis.get_title() for axis in figure.axes] == ["PatchCore", "epoch 1: R² 1.000", "place in\nthe image"]
    colours = figure.axes[0].collections[0].get_facecolors()[:, :3]
    np.testing.assert_allclose(colours, plots.position_colours(positions), atol=1e-6)
    assert len(np.unique(colours.round(6), axis=0)) == 16, "no two places share a colour"


def test_score_maps_without_images_show_none():
    rng = np.random.default_rng(0)
    masks, maps = np.zeros((2, 32, 32), bool), {"PatchCore": rng.random((2, 32, 32))}
    masks[:, 4:9, 4:9] = True
    figure = plots.score_maps(None, masks, maps, {"PatchCore": 0.9})
    inputs = [axis.images[0].get_array() for axis in figure.axes[:4:2]]
    assert all(len(np.unique(image)) == 1 for image in inputs)


def test_save_writes_the_same_two_files_every_time(tmp_path, scores):
    figure = plots.score_histogram({"PatchCore": scores})
    png, pdf = plots.save(figure, tmp_path / "new" / "bottle.v1")
    assert (png.name, pdf.name) == ("bottle.v1.png", "bottle.v1.pdf")
    assert Image.open(png).size == tuple((figure.get_size_inches() * 180).round().astype(int))
    first = png.read_bytes(), pdf.read_bytes()
    plots.save(figure, tmp_path / "new" / "bottle.v1.png")
    assert (png.read_bytes(), pdf.read_bytes()) == first


def test_histogram_titles_are_the_metrics_and_lines_the_thresholds(scores):
    values, labels = scores
    figure = plots.score_histogram({"PatchCore": scores, "ReConPatch": (-values, labels)}, {"ReConPatch": -1.5})
    left, right = figure.axes
    separation = metrics.d_prime(values[labels == 0], values[labels == 1])
    assert left.get_title() == f"PatchCore: d′ = {separation:.3f}, AUROC = {metrics.image_auroc(labels, values):.3f}"
    assert f"AUROC = {1 - metrics.image_auroc(labels, values):.3f}" in right.get_title()
    assert [line.get_xdata()[0] for axis in figure.axes for line in axis.lines] == [-1.5]
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["normal (20)", "defective (60)"]
    for drawn in left.collections:  # the outline of each group's bars holds 100 %
        x, y = drawn.get_paths()[0].vertices.T
        assert abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2) == pytest.approx(
            100 * np.ptp(values) / 24, rel=1e-3
        )


def test_histogram_of_one_class_says_that_the_metrics_are_undefined():
    title = plots.score_histogram({"PatchCore": (np.arange(5.0), np.zeros(5))}).axes[0].get_title()
    assert title == "PatchCore: d′ = –, AUROC = –"


def test_score_maps_mark_ground_truth_threshold_and_maximum():
    images = np.full((2, 32, 32, 3), 128, np.uint8)
    masks, maps = np.zeros((2, 32, 32), bool), np.zeros((2, 32, 32), np.float32)
    masks[0, 4:10, 20:30] = True
    maps[0, 6, 25], maps[1, 30, 2] = 3, 1
    figure = plots.score_maps(images, masks, {"A": maps, "B": maps}, {"A": 2.0}, ["hole", "good"])
    cells = np.array(figure.axes[:6]).reshape(2, 3)
    contours = [[axis.collections for axis in row] for row in cells]
    assert [[len(c) for c in row] for row in contours] == [[1, 2, 1], [0, 0, 0]]  # none where nothing reaches the level
    truth, found = contours[0][0][0], contours[0][1][1]
    assert np.allclose(truth.get_edgecolor(), to_rgba(plots.TRUTH)) and np.allclose(
        found.get_edgecolor(), to_rgba(plots.THRESHOLD)
    )
    box = truth.get_paths()[0].get_extents()
    assert np.allclose([box.x0, box.x1, box.y0, box.y1], [19.5, 29.5, 3.5, 9.5])
    stars = [(line.get_xdata()[0], line.get_ydata()[0]) for row in cells for axis in row[1:] for line in axis.lines]
    assert stars == [(25, 6), (25, 6), (2, 30), (2, 30)]
    assert [axis.get_ylabel() for axis in cells[:, 0]] == ["hole", "good"]
    assert [axis.get_title() for axis in cells[0, 1:]] == ["A", "B"]
    assert {image.get_clim() for axis in cells[:, 1] for image in axis.images[1:]} == {(0, 3)}  # rows can be compared


def test_training_curve_draws_the_rows():
    rows = [
        {"epoch": e, "loss": 3.0 * e, "omega_p_05": 0.1, "omega_p_50": 0.5 / e, "omega_p_95": 0.9} for e in (1, 2, 3)
    ]
    loss, omega = plots.training_curve(rows).axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 3], [2, 6], [3, 9]]
    assert np.allclose(omega.lines[0].get_ydata(), [0.5, 0.25, 0.5 / 3])
    band = omega.collections[0].get_paths()[0].get_extents()
    assert np.allclose([band.x0, band.x1, band.y0, band.y1], [1, 3, 0.1, 0.9])


def test_figure_1_reads_its_numbers_from_the_modules():
    text = said(plots.figure_1(detector()))
    for word in ("resnet18", "64 × 64 × 3", "level 2: 128 × 8 × 8", "level 3: 256 × 4 × 4", "8 × 8\npatches", "{1024}"):
        assert word in text
    assert (
        text.count("1024 → 512") == 4 and text.count("512 → 128") == 2
    )  # f in every lane and its copy; g and its copy
    assert "σ = 1" in text.splitlines() and "γ = 0.999" in text and "k = 5" in text and "1 % of f(p)" in text
    changed = {
        "dim": 96,
        "projection": 24,
        "layers": (1, 2, 3),
        "patch_dim": 320,
        "patch_size": 5,
        "sigma": 2.5,
        "gamma": 0.5,
    }
    other = said(plots.figure_1(detector(**changed, k=7, alpha=0.25, coreset_ratio=0.05, neighbours=4, margin=2.0)))
    for word in (
        "320 → 96",
        "96 → 24",
        "level 1: 64 × 16 × 16",
        "16 × 16\npatches",
        "{320}",
        "5 × 5\n",
        "σ = 2.5",
        "γ = 0.5",
    ):
        assert word in other and word not in text
    for word in ("k = 7", "α = 0.25", "5 % of f(p)", "b = 4", "m = 2"):
        assert word in other and word not in text
    assert "identity" in said(plots.figure_1(detector(projection=None)))
    assert said(plots.figure_1(detector(backbone_dtype="bfloat16"))) == text


def test_figure_1_of_a_fitted_detector_counts_its_memory():
    fitted = detector(dim=64).fit_features(
        np.random.default_rng(0).normal(size=(5, 64, 1024)).astype(np.float32), log=len
    )
    assert "memory bank M\n3 × 64" in said(plots.figure_1(fitted))  # ⌊1 % of 320⌋


@pytest.mark.parametrize(
    "changes", [{}, {"layers": (1, 2, 3)}, {"layers": (1, 2, 3, 4), "patch_dim": 2048, "dim": 1024, "projection": None}]
)
def test_figure_1_has_no_text_over_text_or_beyond_its_edge(changes):
    figure = plots.figure_1(detector(**changes))
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in words(figure)]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 and b.y1 <= figure.bbox.y1 for b in boxes)


def test_figure_1_keeps_long_names_within_the_box_of_the_cnn(tmp_path):
    import torch
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    path = tmp_path / "resnet18_imagenet1k_v1_layers1-3_folded.safetensors"
    torch.manual_seed(0)
    save_file(resnet18().state_dict(), path)
    figure = plots.figure_1(detector(weights=str(path)))
    figure.canvas.draw()
    title = next(t for t in words(figure) if "frozen" in t.get_text())
    box = title.get_window_extent().transformed(figure.axes[0].transData.inverted())
    assert path.stem in title.get_text().replace("\n", "") and box.x0 >= 22 and box.x1 <= 49


def test_figure_1_refuses_a_patchcore():
    with pytest.raises(ValueError, match=r"expected a ReConPatch.*got a PatchCore"):
        plots.figure_1(PatchCore(backbone="resnet18", weights="random:0", device="cpu"))


def test_figure_1_draws_nothing_from_the_random_numbers_of_others():
    import torch

    state = torch.get_rng_state()
    plots.figure_1(detector())
    assert torch.equal(torch.get_rng_state(), state)


def test_figure_2_has_equal_pairwise_and_different_contextual_similarity():
    c, omega_p, omega_c = Config(), {}, {}
    for case, (points, group) in plots.figure_2_points().items():
        omega_p[case] = literal.pairwise(points, c.sigma)[0, 1]
        omega_c[case] = literal.contextual(points, c.k, c.k_half)[0, 1]
        assert (group[0] == group[1]) == (case == "b")
    assert omega_p["a"] == pytest.approx(omega_p["b"], abs=1e-6) and 0.2 < omega_p["a"] < 0.8
    assert omega_c["b"] - omega_c["a"] > 0.5
    for axis, case in zip(plots.figure_2().axes, "ab", strict=True):
        assert f"{omega_p[case]:.3f}" in axis.get_title() and f"{omega_c[case]:.3f}" in axis.get_title()
    assert f"{np.exp(-0.64 / 2):.3f}" in plots.figure_2(Config(sigma=2.0)).axes[0].get_title()
