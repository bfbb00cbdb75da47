"""A fitted detector as one file that needs no rcp where it runs: ONNX (``.onnx``) or torch.export (``.pt2``)."""

import copy
import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rcp.backbone import normalize
from rcp.checks import require
from rcp.files import scratch
from rcp.maps import axis_operator
from rcp.patches import pool
from rcp.paths import require_writable

OUTPUTS = ("scores", "maps", "defective")


class Deployed(nn.Module):
    """images: (n, S, S, 3) uint8, resized and cropped -> scores (n,), maps (n, S, S) float32, and with a threshold defective (n,) bool.

    The whole of Eq. 9 and 10 by plain products, so that any runtime can run it.
    """

    def __init__(self, detector):
        super().__init__()
        c, extractor, bank = detector.config, detector.extractor, detector.bank_
        self.trunk, self.aggregate, self.f = extractor.backbone, extractor.aggregate, detector.f_
        self.dim, self.held_as = bank.entries.shape[1], getattr(torch, c.feature_dtype)
        self.side, self.of_cnn = extractor.shape()[:2], extractor.backbone_dtype
        self.weighted = c.weighting != "none" and bank.b > 1
        self.threshold = detector.threshold_
        rows, columns = (axis_operator(n, c.image_size, c.blur).float() for n in self.side)
        held = {"entries": bank.entries, "centre": bank.entries.mean(0), "rows": rows, "columns": columns.T}
        if self.weighted:
            held["neighbourhood"] = bank.neighbourhood
        for name, tensor in held.items():
            self.register_buffer(name, tensor.detach().cpu().clone(memory_format=torch.contiguous_format))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        p = self.aggregate([m.float() for m in self.trunk(normalize(images).to(self.of_cnn))])
        p = p.to(self.held_as).float().flatten(0, 1)
        x = pool(p, self.dim) if self.f is None else self.f(p)
        entries = self.entries - self.centre  # distances stay, and small ones keep their digits
        nearest = (entries.square().sum(1) - 2 * (x - self.centre) @ entries.T).argmin(1)
        d = (x - self.entries[nearest]).square().sum(1).sqrt()  # Eq. 9
        s = d
        if self.weighted:
            around = (x[:, None] - self.entries[self.neighbourhood[nearest]]).square().sum(2).sqrt()
            s = (1 - torch.exp(d - around.logsumexp(1))) * d  # Eq. 10
        s = s.reshape(-1, *self.side)
        scores = s.flatten(1).amax(1)
        decided = () if self.threshold is None else (scores >= self.threshold,)
        return scores, self.rows @ s @ self.columns, *decided


def export(detector, path: str | Path) -> Path:
    """Writes ``path`` (.onnx or .pt2), checked against ``predict`` on images of noise; resize and crop stay outside, named in the file.

    A detector without a threshold gives scores and maps alone. Where a patch is as near to two entries as float32 can tell, Eq. 10 may
    weight it by the other one's neighbours here: with ResNet-50 and 1 % of bottle one map of 83 differs from ``predict``'s by 0.05
    there, all others by at most 4e-4, scores by at most 6e-5.

    Raises:
        ValueError: another suffix; a detector with tiles, or a refinement network; what the file gives is off by more than 1e-4
            (scores) or 1e-3 (maps) of the largest: it is not written then.
        ImportError: an ONNX file without the extra ``export``; says how to get it.
        FileNotFoundError: no such folder.
    """
    path, c = Path(path), detector.config
    require("path", path.suffix in (".onnx", ".pt2"), "a name that ends in .onnx or .pt2", str(path))
    require("tiles", c.tiles == (1, 1), "(1, 1): a file takes one tile at a time", c.tiles)
    require("refine", detector.refiner_ is None, "a detector without a refinement network", "one with it")
    fits = path.suffix == ".pt2" or c.backbone_dtype == "float32"
    require("backbone_dtype", fits, "float32 for an ONNX file, whose runtime lacks others", c.backbone_dtype)
    require_writable(path, "export {} into", b'{"transform": "Transform(')
    if path.suffix == ".onnx" and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise ImportError('an ONNX file needs the extra export: pip install "rcp[export]", or write a .pt2 file')
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, c.image_size, c.image_size, 3), np.uint8))
    module = copy.deepcopy(Deployed(detector)).eval().cpu()  # the detector stays where it is
    any_number = {"images": {0: torch.export.Dim("n", min=1, max=4096)}}
    names = OUTPUTS[: 2 if module.threshold is None else 3]
    about = {"rcp": json.dumps(dict(transform=repr(detector.transform), threshold=module.threshold, outputs=names))}
    with scratch(path.resolve()) as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program, written = torch.export.export(module, (images[:2],), dynamic_shapes=any_number), folder / path.name
        if path.suffix == ".pt2":
            torch.export.save(program, written, extra_files=about)
            run = torch.export.load(written).module()
        else:
            run = _write_onnx(program, images, written, about, names)
        _check(detector, images.numpy(), [np.asarray(out) for out in run(images)])
        written.replace(path.resolve())
    return path


def _write_onnx(program, images: Tensor, path: Path, about: dict, names: tuple[str, ...]):
    """Writes the file; -> what runs it: onnxruntime where it is there, else the program that it was made from."""
    made = torch.onnx.export(program, (images[:2],), input_names=["images"], output_names=names, verbose=False)
    made.model.metadata_props.update(about)
    made.save(path)
    if importlib.util.find_spec("onnxruntime") is None:
        return program.module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, {"images": given.numpy()})


def _check(detector, images: np.ndarray, found: list[np.ndarray]) -> None:
    own = detector.predict_features(detector.extractor(images))
    for name, expected, got, most in (("scores", own.scores, found[0], 1e-4), ("maps", own.maps, found[1], 1e-3)):
        off = float(np.abs(got - expected).max() / np.abs(expected).max())
        require("export", off <= most, f"{name} within {most:g} of predict's", f"{off:.2g}")
