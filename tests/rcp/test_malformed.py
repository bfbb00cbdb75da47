"""Malformed calls and files: each ends in an error that names the argument or the file, raised by rcp itself, before any work."""

import dataclasses
import json
import math
import os
import signal
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_damage import IMAGES, TINY

from rcp import Config, PatchCore, ReConPatch, coreset, decision, maps, metrics, model, scoring
from rcp.data import Split, Transform, categories, load_dataset, load_images
from rcp.data.perturb import Perturbation
from rcp.detector import load
from rcp.files import read_tensors, write_tensors
from rcp.refinement import Refinement, Simulation
from rcp.refinement.simulation import simulate
from rcp.watch import watch

RCP = str(Path(coreset.__file__).parent)
JUNK = (b"1", object(), math.nan, math.inf, 1j, 10**30, print, [["a"], [1, 2]])  # no argument is one of these
ODD = (*JUNK, None, "x", [], {})
X, Y, F = torch.randn(50, 8), np.array([0, 1, 0, 1]), torch.randn(3, 16, 64)
SMALL = Config(dim=32, epochs=1, batch_size=16, device="cpu", patch_dim=64)
TENSORS = ("x", None, X.numpy(), X[0], X * math.nan, X * 1e19, X.long(), X[:0], X[:, :0], X.to(torch.complex64))
TENSORS += (X.to_sparse(), X.to("meta"), X.clone().requires_grad_())
COUNTS = (None, "3", 0, -1, 1.5, math.nan, [], True, 10**30)
NUMBERS = (None, "x", math.nan, math.inf, [], True, 1j)
PATHS = (None, 3, "", [], {}, b"x", 1.5, "a\0b", "x" * 5000, math.nan, True)
MASKED = np.ma.masked_array([1.0, 2, 3, 4], [0, 1, 0, 0])
SCORES = (None, "x", {}, ["a"] * 4, [[1], [1, 2]], [None] * 4, np.array([1j] * 4), object(), np.array(["2020"], "M8"), MASKED)  # fmt: skip
REFINE = (1, "yes", [], {"epoch": 1}, {1: 2}, {"epochs": -1}, {"simulation": 3}, {"simulation": {"x": 1}}, {"rates": 1})


def calls(detector, folder):
    """(what the message names, the call of one value, bad values)."""
    out = detector.predict(IMAGES)
    p = np.ones((4, 64, 1024), np.float16)
    kinds = (int, object, str, ">f2", np.longdouble)
    of_p = (None, "x", 3, [], p[0], p[..., :5], p[:, :7], p * np.nan, *map(p.astype, kinds))
    of_p += (np.float32(p) * 1e7, np.ma.masked_less(p, 2))
    for name in {f.name for f in dataclasses.fields(out)} - {"why"}:
        yield name, lambda v, name=name: dataclasses.replace(out, **{name: v}), (3j, "x", object(), MASKED, {})
    for name in ("scores", "maps", "patch_scores", "paths", "originals"):
        yield "", lambda v, name=name: dataclasses.replace(out, **{name: v}), [getattr(out, name)[:1]]
    for kind in (Config, Refinement, Perturbation, Simulation, Transform):
        for field in dataclasses.fields(kind):
            yield field.name, lambda v, kind=kind, name=field.name: kind(**{name: v}), JUNK
        yield "typo", lambda _, kind=kind: kind(typo=1), [0]
    yield from (
        ("features", lambda v: coreset.greedy_k_center(v, 3), TENSORS),
        ("count", lambda v: coreset.greedy_k_center(X, v), (*COUNTS, 51)),
        ("start", lambda v: coreset.greedy_k_center(X, 3, start=v), ODD),
        ("projection", lambda v: coreset.greedy_k_center(X, 3, projection=v), COUNTS[1:]),
        ("seed", lambda v: coreset.greedy_k_center(X, 3, seed=v), (*ODD, -1, 2**64)),
        ("among", lambda v: coreset.greedy_k_center(X, 3, among=v), (3, "x", X[:, 0], X[:5, 0] > 0)),
        ("ratio", lambda v: coreset.coreset_size(v, 100), (*NUMBERS, 0, -1, 2.0, 1e-9)),
        ("count", lambda v: coreset.random_selection(10, v, 0), (*COUNTS, 11)),
        ("among", lambda v: coreset.random_selection(10, 2, 0, v), (3, "x", X[:5, 0] > 0, X[:, 0] > 0)),
        ("queries", lambda v: scoring.nearest_entries(v, X), TENSORS[:6]),
        ("entries", lambda v: scoring.nearest_entries(X, v), TENSORS[:6]),
        ("entries", lambda v: scoring.MemoryBank(v, 3), TENSORS),
        ("b", lambda v: scoring.MemoryBank(X, v), COUNTS),
        ("queries", lambda v: scoring.patch_scores(v, scoring.MemoryBank(X, 3)), TENSORS[:6]),
        ("weighting", lambda v: scoring.patch_scores(X, scoring.MemoryBank(X, 3), v), ODD),
        ("size", lambda v: maps.score_maps(torch.rand(2, 8, 8), v, 4.0), (*COUNTS, (1,), (0, 4), 10**9)),
        ("blur", lambda v: maps.score_maps(torch.rand(2, 8, 8), 32, v), (*NUMBERS, -1, 1e9)),
        ("scores", maps.center_and_deviation, (*SCORES, [], [math.nan])),
        ("beta", lambda v: maps.modified_z_score([1.0], 0.0, 1.0, v), (*NUMBERS, 0, -1)),
        ("held_out", decision.threshold, (*SCORES, [math.nan, 1, 2], [1e39, 1, 2])),
        ("rate", lambda v: decision.threshold(np.arange(99.0), v), (*NUMBERS[1:], 0, 1, -1, 1e-9)),
        ("false_alarm_rate", lambda v: decision.false_alarms(5, v, 10), (0, 1, 0.01)),
        ("features", lambda v: model.train(v, SMALL, len), (None, "x", F.numpy(), F[0], F * math.nan, F.long(), F[:0], F > 0)),
        ("config", lambda v: model.train(F, v, len), (None, {}, 3, SMALL.asdict())),
        ("log", lambda v: model.train(F, SMALL, v), (None, 3, "x")),
        ("scores", partial(metrics.image_auroc, Y), SCORES),
        ("limit", lambda v: metrics.aupro(np.eye(2)[None] > 0, np.eye(2)[None], v), (*NUMBERS, 0, 2)),
        ("ddof", lambda v: metrics.d_prime([1, 2.0], [3, 5.0], ddof=v), (None, "x", -1, 1.5, math.nan)),
        ("prediction", lambda v: metrics.evaluate(v, None), (None, 3, {}, "x")),
        ("config", ReConPatch.from_config, (None, 3, {}, TINY)),
        ("", lambda v: PatchCore(**TINY, refine=v), REFINE),
        ("", PatchCore(**TINY).fit, (None, 3, {}, [], "", "no.png", b"x", [None], np.zeros((4, 4), np.uint8), "a\0b", "x" * 5000)),
        ("", detector.predict, (None, 3, {}, "", "no.png", b"x", [3], ["no.png"], p, "/dev/zero", "a\0b", [Image.new("F", (8, 8))])),
        ("masked", detector.predict, (np.ma.masked_less(IMAGES, 128), [np.ma.masked_less(IMAGES[0], 128)])),
        ("Tensor", detector.predict, (torch.from_numpy(IMAGES), X)),
        ("pixels", detector.predict, (IMAGES[:, :0], Image.new("RGB", (0, 8)))),
        ("log", lambda v: detector.fit(IMAGES, v), (None, 3, "x")),
        ("log", lambda v: next(watch(detector, folder, v)), (None, 3, "", folder, folder / "pipe", Path("/dev/null"), folder / "a.rcp")),
        ("seconds", lambda v: next(watch(detector, folder, folder / "l", v)), (None, "x", -1, math.nan, 1e300, True)),
        ("batch", lambda v: detector.predict_iter(IMAGES, batch=v), COUNTS[1:]),
        ("skipped", lambda v: detector.predict_iter(IMAGES, skipped=v), ((), "x", 3, True)),
        ("p", detector.predict_features, of_p),
        ("p", lambda v: PatchCore.assemble(detector.config, None, v), of_p),
        ("f", lambda v: PatchCore.assemble(detector.config, v, p), (3, "x", torch.nn.Linear(3, 4), torch.nn.ReLU())),
        ("path", detector.save, (*PATHS, folder, "/proc/x.rcp", *(folder / n for n in ("pipe", "x.png", "notes.pt2")))),
        ("path", detector.export, (*PATHS, folder, "x.txt", folder / "notes.pt2")),
        ("path", ReConPatch.load, PATHS),
        ("epochs", lambda v: setattr(detector, "epochs", v), (3, None)),
        ("device", lambda v: load(folder / "a.rcp", device=v), (3, [], {}, "", "gpu", "mps", "hpu", "cuda:99", "meta", True)),
        ("weights", lambda v: load(folder / "a.rcp", weights=v), (3, [], {}, "random:1", "random:x", f"random:{10**30}", "no.pth", True)),
        ("patch_scores", dataclasses.replace(out, patch_scores=None).boxes, [0]),
        ("numbers", lambda v: simulate(IMAGES, Simulation(kind="structure"), numbers=v), (3, "x", [1])),
        *(("i", getattr(out, name), (None, "x", 1.5, [], -1, 99, True)) for name in ("boxes", "maps_on_original", "overlay")),
        ("i", out.__getitem__, (None, "x", 1.5, [], -9, 99, slice(0, 2))),
        *(("root", f, (*PATHS, "/nope", folder / "a.rcp")) for f in (load_dataset, categories)),
        ("paths", lambda v: load_images(v, Transform(8, 8)), (None, 3, "x", {})),
        ("labels", lambda v: Split((folder,), v, ("a",), (None,)), (None, 3, "x", [math.nan], ["a"], [2], [0.5], [[1]])),
    )  # fmt: skip


def refused(call, value, name: str) -> str:
    """ "" where the call ends as it should, else what happened."""
    signal.alarm(60)
    try:
        return f"silent: {call(value)!r:.80}"
    except TypeError as error:  # Python's own, of a name that is no argument
        return "" if "unexpected keyword argument" in str(error) else f"TypeError: {error}"
    except (ValueError, OSError) as error:
        own = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(RCP) or isinstance(error, OSError)
        fits = own and len(str(error)) < 6000  # no register of a library's
        return "" if fits and (name in str(error) or isinstance(error, OSError)) else f"{own=} {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    detector = PatchCore(**TINY).fit(IMAGES, log=len)
    detector.save(folder / "a.rcp")
    os.mkfifo(folder / "pipe")
    (folder / "notes.pt2").write_text("mine")
    return detector, folder


def test_a_malformed_call_is_refused_by_the_argument_s_name(fitted):
    tried, wrong = 0, []
    for name, call, values in calls(*fitted):
        for value in values:
            tried += 1
            if why := refused(call, value, name):
                wrong.append(f"{name}={value!r:.60}: {why:.200}")
    print(f"\nmalformed calls: {tried}, accepted or unclear: {len(wrong)}")
    assert not wrong and tried >= 520, "\n".join(wrong)
    assert (fitted[1] / "notes.pt2").read_text() == "mine"


def test_a_detector_s_file_that_is_sound_but_wrong_is_refused_by_its_path(tmp_path):
    tried, wrong, bad = 0, [], tmp_path / "bad.rcp"
    ReConPatch(**TINY, representation="random").fit(IMAGES, log=len).save(tmp_path / "a.rcp")
    header, tensors = read_tensors(tmp_path / "a.rcp", "rcp-detector")
    config = json.loads(header["config"])
    damaged = []
    for name, t in tensors.items():
        for new in (t.long(), t.double(), t.half(), t[None], t.flatten()[:0], t * math.nan, torch.tensor(1.0)):
            damaged.append((tensors | {name: new}, header))
        if name != "train_scores":
            damaged.append((tensors | {name: torch.cat([t, t], -1)}, header))
            damaged.append(({n: other for n, other in tensors.items() if n != name}, header))
    damaged += [(tensors | {name: tensors["bank"].clone()}, header) for name in ("bank.x", "other", "refiner.slope")]
    for name in set(config) - {"device"}:
        damaged += [(tensors, header | {"config": json.dumps(config | {name: v})}) for v in ("x", [], -1e30)]
    for name in ("config", "refine", "false_alarm_rate", "backbone", "format"):
        damaged += [(tensors, header | {name: text}) for text in ("{", "[]", "3")]
    for content in damaged:
        write_tensors(bad, *content)
        tried += 1
        if why := refused(lambda file: load(file), bad, "bad.rcp"):
            wrong.append(f"{tried}: {why:.200}")
    print(f"\nmalformed detectors, soundly hashed: {tried}, accepted or unclear: {len(wrong)}")
    assert not wrong, "\n".join(wrong)
