"""Entries with a refinement network (Tables S7 and S8): computed once, resumed after a kill, averaged in an ensemble."""

import numpy as np
import pytest
from PIL import Image
from test_entries import SMALL

from rcp import ReConPatch
from rcp.data import load_dataset
from rcp.metrics import evaluate
from rcp.refinement import RefinementConfig
from reproduce import grids
from reproduce.entries import Ensemble, Entry, Refined
from reproduce.notebook import Settings
from reproduce.run import run
from reproduce.store import Store, key_of

REFINE = {"channels": 8, "rates": (1, 2), "epochs": 2, "batch_size": 4, "kind": "structure"}


@pytest.fixture
def entry(small_demo):
    return Entry(SMALL, str(small_demo), "gear")


def test_a_refined_entry_is_computed_once_and_goes_on_after_a_kill(entry, tmp_path):
    store, task = Store(tmp_path), Refined(entry, RefinementConfig.build(**REFINE))

    def killed(line):
        if line.startswith("refinement epoch   1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(task, store, killed)
    (written,) = (tmp_path / "checkpoints").glob("*.safetensors")
    written.with_name(f".{written.name}.rcp-0123abcd").mkdir()  # as of a process that was killed while it wrote
    lines = []
    result = run(task, store, lines.append)
    assert not any("refinement epoch   1" in line for line in lines) and result.computed
    assert not list((tmp_path / "checkpoints").iterdir()), "done: no checkpoint is left"
    assert not run(task, store, pytest.fail).computed
    data = load_dataset(entry.dataset, category="gear")
    direct = ReConPatch(**SMALL.asdict(), refine=REFINE).fit(data.train, log=len).predict(data.test)
    np.testing.assert_allclose(result.maps(), direct.maps, rtol=2e-2, atol=1e-4)  # kept in half precision
    np.testing.assert_allclose(result.scores, direct.scores, atol=1e-5)
    expected = evaluate(direct, data.test)
    for name in ("image_auroc", "pixel_auroc", "aupro"):
        assert result.metrics[name] == pytest.approx(expected[name], abs=1e-5)
    assert (task.columns()["refinement"], entry.columns()["refinement"]) == ("with", "without")
    assert task.columns()["simulation"] == "structure"


def test_identity_of_a_refined_entry(entry, tmp_path):
    def key(**changes):
        return key_of(Refined(entry, RefinementConfig.build(**(REFINE | changes))).identity())

    textures = {n: {"kind": "texture", "textures": str(tmp_path / n)} for n in ("a", "b")}
    for folder in textures:
        (tmp_path / folder / "dotted").mkdir(parents=True)
        Image.new("RGB", (80, 80), "red").save(tmp_path / folder / "dotted" / "1.png")
    assert key() == key() and key(**textures["a"]) == key(**textures["b"]), "where the same textures lie is no matter"
    Image.new("RGB", (80, 80), "blue").save(tmp_path / "b" / "dotted" / "1.png")  # of the same size
    others = [key(seed=1), key(epochs=3), key(opacity=(0.5, 1.0)), key(**textures["a"]), key(**textures["b"])]
    assert len({key(), *others}) == 6


def test_an_ensemble_of_refined_members_is_the_mean_of_their_maps(entry, tmp_path):
    store = Store(tmp_path)
    entries = [Entry(SMALL.replace(weights=f"random:{i}"), entry.dataset, "gear") for i in range(2)]
    members = tuple(Refined(e, RefinementConfig.build(**REFINE)) for e in entries)
    found = run(Ensemble(members), store, len)
    results = [run(m, store, pytest.fail) for m in members]
    np.testing.assert_allclose(found.scores, np.mean([r.scores for r in results], 0))
    assert Ensemble(members).columns()["refinement"] == "with"
    with pytest.raises(ValueError, match="members: expected all of them refined, or none"):
        Ensemble((entries[0], members[1]))


def test_grids_of_tables_s7_and_s8(demo_root):
    s = Settings(profile="paper", data_root=str(demo_root))
    s7, s8 = grids.table_s7(s), grids.table_s8(s)
    simulated = [t.columns()["simulation"] for t in s7[:: len(s.categories) * 3]]
    assert simulated == ["no refinement", "texture", "structure"]
    assert all(t.refine.seed == t.config.seed and t.refine.epochs == 500 for t in s7 if isinstance(t, Refined))
    sizes = {(t.config.image_size, t.columns()["refinement"]) for t in s8}
    assert sizes == {(a, b) for a in (320, 480) for b in ("with", "without")}
    assert all(t.method == "ReConPatch" and len(t.members) == 3 for t in s8)
    plain = [t for t in grids.table_6(s) if t.config.representation == "trained"]
    assert [t for t in s8 if t.columns()["refinement"] == "without"] == plain, "computed once, with Table 6"
    assert grids.refinement(s, epochs=7, opacity=[0.5, 1.0]).simulation.opacity == (0.5, 1.0)
    with pytest.raises(ValueError, match="refine: unknown option 'epoch'"):
        grids.refinement(s, epoch=7)
