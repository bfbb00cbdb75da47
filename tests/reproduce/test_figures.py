"""Figures: what they say is what the objects hold and what the metrics compute."""

import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from rcp import losses, metrics
from reproduce import figures
from reproduce.figures import spaces, style


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(1, 0.2, 20), rng.normal(2, 0.4, 60)]), np.repeat([0, 1], [20, 60])


def averages(*means, left_out=""):
    """Rows as of compare: settings k 0, k 1, ... with a mean each; the first one's published value is 99.5."""
    about = {"metric": "image_auroc", "kind": "all", "n": 15, "left_out": left_out, "spread": 0.2}
    rows = [about | {"setting": f"k {i}", "mean": m, "published": np.nan if i else 99.5} for i, m in enumerate(means)]
    return pd.DataFrame(rows, columns=[*about, "setting", "mean", "published"])


def panel_texts(figure):
    return [[t.get_text() for t in axis.texts] for axis in figure.axes]


def test_save_writes_the_same_two_files_every_time_with_where_its_numbers_are_from(tmp_path, scores):
    figure = figures.score_histogram({"PatchCore": scores})
    png, pdf = figures.save(figure, tmp_path / "new" / "bottle.v1", "bottle; resnet18, 10 epochs")
    assert (png.name, pdf.name) == ("bottle.v1.png", "bottle.v1.pdf")
    assert figure.get_supxlabel() == "bottle; resnet18, 10 epochs"
    assert Image.open(png).size == tuple((figure.get_size_inches() * 180).round().astype(int))
    first = png.read_bytes(), pdf.read_bytes()
    figures.save(figure, tmp_path / "new" / "bottle.v1")
    assert (png.read_bytes(), pdf.read_bytes()) == first


def test_a_figure_of_nothing_says_so():
    nothing = np.zeros((0, 1, 1), bool)
    for figure in (
        figures.ablation({"S1": averages()}),
        figures.bank_memory(pd.DataFrame(columns=["method", "megabytes", "metric"])),
        figures.score_histogram({}),
        figures.score_maps(None, nothing, {}, {}, []),
        figures.refined_maps(None, nothing, {}, {}, []),
        figures.score_map_sheet(None, nothing, {}, [], []),
        figures.feature_space({}, np.zeros((1, 2), int)),
    ):
        assert panel_texts(figure) == [[style.NOTHING]]


def test_ablation_draws_ours_and_the_published_for_each_table_also_an_empty_one():
    tables = {"S1": averages(), "S2": averages(99.0, 98.0), "S3": averages(99.0, left_out="carpet")}
    figure = figures.ablation(tables)
    assert [axis.get_title() for axis in figure.axes] == ["S1", "S2", "S3"], "one row of panels for one metric"
    assert panel_texts(figure) == [[style.NOTHING], [], ["without carpet"]]
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    np.testing.assert_array_equal(lines["published"].get_ydata(), [99.5, np.nan])
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == ["k 0", "k 1"]
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"published", "ours"}
    fewer = figures.ablation({"S1": averages(99).assign(n=1)})
    assert "published, 15 categories" in {t.get_text() for t in fewer.legends[0].get_texts()}


def test_histogram_titles_are_the_metrics_and_lines_the_thresholds(scores):
    values, labels = scores
    figure = figures.score_histogram({"PatchCore": scores, "ReConPatch": (-values, labels)}, {"ReConPatch": -1.5})
    left, right = figure.axes
    separation = metrics.d_prime(values[labels == 0], values[labels == 1])
    assert left.get_title() == f"PatchCore: d′ = {separation:.3f}, AUROC = {metrics.image_auroc(labels, values):.3f}"
    assert f"AUROC = {1 - metrics.image_auroc(labels, values):.3f}" in right.get_title()
    assert [line.get_xdata()[0] for axis in figure.axes for line in axis.lines] == [-1.5]
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["normal (20)", "defective (60)"]
    for drawn in left.collections:  # the outline of each group's bars holds 100 %
        x, y = drawn.get_paths()[0].vertices.T
        area = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2)
        assert area == pytest.approx(100 * np.ptp(values) / 24, rel=1e-3)
    one_class = figures.score_histogram({"PatchCore": (np.arange(5.0), np.zeros(5))})
    assert one_class.axes[0].get_title() == "PatchCore", "of one class there is neither"


def test_score_maps_mark_ground_truth_threshold_and_maximum():
    images = np.full((2, 32, 32, 3), 128, np.uint8)
    masks, maps = np.zeros((2, 32, 32), bool), np.zeros((2, 32, 32), np.float32)
    masks[0, 4:10, 20:30] = True
    maps[0, 6, 25], maps[1, 30, 2] = 3, 1
    figure = figures.score_maps(images, masks, {"A": maps, "B": maps}, {"A": 2.0}, ["hole", "good"])
    panels = np.array(figure.axes[:6]).reshape(2, 3)
    contours = [[axis.collections for axis in row] for row in panels]
    assert [[len(c) for c in row] for row in contours] == [[1, 2, 1], [0, 0, 0]]  # none where nothing reaches the level
    truth, found = contours[0][0][0], contours[0][1][1]
    assert np.allclose(truth.get_edgecolor(), to_rgba(style.TRUTH))
    assert np.allclose(found.get_edgecolor(), to_rgba(style.THRESHOLD))
    box = truth.get_paths()[0].get_extents()
    assert np.allclose([box.x0, box.x1, box.y0, box.y1], [19.5, 29.5, 3.5, 9.5])
    stars = [(line.get_xdata()[0], line.get_ydata()[0]) for row in panels for axis in row[1:] for line in axis.lines]
    assert stars == [(25, 6), (25, 6), (2, 30), (2, 30)]
    assert [axis.get_ylabel() for axis in panels[:, 0]] == ["hole", "good"]
    assert [axis.get_title() for axis in panels[0, 1:]] == ["A", "B"]
    assert {image.get_clim() for axis in panels[:, 1] for image in axis.images[1:]} == {(0, 3)}  # rows can be compared
    hidden = figures.score_maps(None, masks, {"A": maps}, {}).axes[0].images[0].get_array()
    assert len(np.unique(hidden)) == 1, "without images there are none"


def test_refined_maps_end_in_a_roc_where_there_is_a_defect():
    masks, maps = np.zeros((2, 16, 16), bool), np.random.default_rng(0).random((2, 16, 16))
    masks[0, 2:5, 2:5] = True
    figure = figures.refined_maps(None, masks, {"A": maps, "B": maps}, {}, ["hole", "good"])
    rocs = np.array(figure.axes).reshape(4, 2)[3]
    assert [[len(line.get_xdata()) > 0 for line in axis.lines] for axis in rocs] == [[True] * 2, [False] * 2]


def test_figure_2_has_equal_pairwise_and_different_contextual_similarity():
    import torch

    omega_p, omega_c = [], []
    for points, _ in spaces.figure_2_points().values():
        d2 = losses.squared_distances(torch.from_numpy(points))
        omega_p.append(losses.pairwise(d2, 1.0)[0, 1].item())
        omega_c.append(losses.contextual(d2, 5)[0, 1].item())
    assert omega_p == pytest.approx([np.exp(-0.64)] * 2, abs=1e-6) and omega_c[1] - omega_c[0] > 0.5
    for axis, p, c in zip(figures.figure_2().axes, omega_p, omega_c, strict=True):
        assert f"{p:.3f}" in axis.get_title() and f"{c:.3f}" in axis.get_title()
    assert f"{np.exp(-0.64 / 2):.3f}" in figures.figure_2(sigma=2.0).axes[0].get_title()


@pytest.mark.parametrize("name", ["cost $5 or $6: hole", "a$^$b", "螺丝: hole", "rocket 🚀", "bad \udce9"])
def test_a_name_is_drawn_as_it_is_or_escaped_visibly(name):
    with warnings.catch_warnings(), style.style():
        warnings.simplefilter("error")  # a missing glyph is an empty box
        figure, (row,) = style.subplots(1, 1, (2, 2))
        row[0].set_title(style.plain(name))
        figure.canvas.draw()
    shown = style.plain(name).replace(r"\$", "$")
    assert all(c in shown or rf"\u{ord(c):04x}" in shown or rf"\U{ord(c):08x}" in shown for c in name)


def test_accuracy_against_time_is_of_the_methods_that_have_all_categories():
    values = [("A", "easy", 1.0), ("A", "hard", 0.5), ("B", "easy", 0.9), ("B", "hard", None), ("B", "other", 0.1)]
    values += [("C", "hard", 0.2), ("C", "easy", 0.6), ("C", "more", None)]
    rows = [{"method": m, "category": c, "image_auroc": v, "inference_ms": 5, "fit_seconds": 7} for m, c, v in values]
    axis = figures.against_time(pd.DataFrame(rows).astype({"image_auroc": float})).axes[0]
    assert {line.get_label(): line.get_ydata()[0] for line in axis.lines} == {"A": 75, "C": 40}
    assert axis.get_ylabel().endswith("(easy, hard)") and not figures.against_time(pd.DataFrame()).legends
