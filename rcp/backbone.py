"""Frozen ImageNet CNN → feature maps of chosen hierarchy levels (Sec. 3.1)."""

import gc
import hashlib
import logging
import sys
import threading
import zipfile
from functools import lru_cache, wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rcp.checks import nearest, require
from rcp.files import file_hash, stamp
from rcp.paths import weights_root

logger = logging.getLogger("rcp")
# Held where a seed is set, which is the process's, and where a CNN is built: tracing changes the call of every module in all threads.
ALONE = threading.RLock()
_NO_CNN = (AssertionError, AttributeError, RuntimeError, TypeError)  # what transformers of one size raise

# Those of the paper; any other CNN is timm's, which lists its levels.
OF_TORCHVISION = ("resne*", "wide_resne*", "densenet*")
DEFAULT_TAGS = ("pretrained", "IMAGENET1K_V1")  # of a timm model, whatever timm takes for its own
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """images: (n, 3, S, S) float32, ImageNet-normalised -> one (n, C_l, S_l, S_l) feature map per level; frozen, eval mode.

    Level l is the last output at stride 2^(l+1): of torchvision ResNet's ``layer{l}`` and DenseNet's ``denseblock{l}``, of any timm
    model its feature of that reduction. Nothing deeper than the deepest level exists or runs.
    Weights of a timm tag see the mean and deviation that timm names for them; a file's see ImageNet's.

    Args:
        name: a ResNet (ResNeXt, Wide ResNet) or DenseNet of torchvision, or a timm model.
        weights: a tag of that model ("IMAGENET1K_V1", timm: "pretrained" or a tag), a .safetensors or .pth file
            (layers deeper than needed may be missing), or "random:SEED" (PyTorch's initialisation under that seed).
        levels: hierarchy levels, ascending.

    Raises:
        ValueError: unknown name or level; weights that do not fit (missing and unexpected keys, shapes).
        FileNotFoundError: no such weights file.
    """

    def __init__(self, name: str, weights: str, levels: tuple[int, ...]):
        super().__init__()
        check(name, weights)
        gc.collect()  # a traced CNN is a cycle: the one before would stay until Python's collector happens by, 11 to 260 MiB each time
        self.name, self.levels = name, tuple(levels)
        try:
            with ALONE, torch.random.fork_rng(devices=[]):
                torch.manual_seed(_seed_of(weights) or 0)
                self.trunk, full_keys, normal = _build(name, weights, self.levels)
                if is_file(weights):
                    _load_file(self.trunk, full_keys, Path(weights), name)
                self.rescaled = normal != (IMAGENET_MEAN, IMAGENET_STD)
                given = IMAGENET_MEAN, IMAGENET_STD, *normal
                mean, std, own_mean, own_std = (torch.tensor(v)[:, None, None] for v in given)
                self.register_buffer("scale", std / own_std, persistent=False)
                self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)
                self.eval().requires_grad_(False)
                with torch.inference_mode():
                    maps = self(torch.zeros(1, 3, 64, 64))
        except _NO_CNN as error:
            why = f"{name} ({type(error).__name__}: {error})"
            raise ValueError(f"backbone: expected a CNN for images of any size, got {why}") from None
        shapes = [tuple(m.shape) for m in maps]
        square = all(len(shape) == 4 and shape[2] == shape[3] for shape in shapes)
        require("backbone", square, "a CNN with maps (n, C, h, w)", f"{name} with {shapes}")
        self.channels = tuple(shape[1] for shape in shapes)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.eval()  # a copy of a traced module normalises by its batch, as in training

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.rescaled:
            images = images * self.scale + self.shift
        return list(self.trunk(images).values())


def normalize(images: Tensor) -> Tensor:
    """images: (n, S, S, 3) uint8 -> (n, 3, S, S) float32 with ImageNet's mean and deviation."""
    mean, std = (torch.tensor(v, device=images.device) for v in (IMAGENET_MEAN, IMAGENET_STD))
    images = images.float().div_(255).sub_(mean).div_(std)
    return images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def weights_identity(name: str, weights: str) -> str:
    """What the weights are, not where: a file's content hash, else the tag or ``random:SEED`` itself, with the model's name."""
    if not is_file(weights):
        return f"{name}/{weights}"
    return f"{name}/blake2b:{_file_hash(weights, *stamp(Path(weights)))}"


def check(name: str, weights: str) -> None:
    """Raises where the model's name, the tag, the file or the seed cannot be right; builds nothing.

    Raises:
        ValueError: neither torchvision (``OF_TORCHVISION``) nor timm has the model, or the model has no such tag, or the seed is no number.
        FileNotFoundError: no such weights file.
    """
    require("weights", bool(weights), 'a tag such as IMAGENET1K_V1, a file, or "random:SEED"', weights)
    models, tag = imported("torchvision.models"), _tag_of(weights)
    if name in (known := models.list_models(models, OF_TORCHVISION)):
        tags = [w.name for w in models.get_model_weights(name)]
    else:
        timm = imported("timm")
        if not timm.is_model(name):
            near = f"{nearest(name, known + timm.list_models())} Of torchvision's, ResNets and DenseNets are taken."
            raise ValueError(f"backbone: neither torchvision nor timm has a model {name!r}.{near}")
        tags = [*DEFAULT_TAGS, *(tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{name}.*"))]
    if tag and tag not in tags:
        expected = f"expected {', '.join(tags)}, a file, or random:SEED.{nearest(tag, tags)}"
        raise ValueError(f"weights: {name} has no weights {tag!r}; {expected}")
    if is_file(weights) and not Path(weights).is_file():
        expected = "expected a .safetensors or .pth file, a tag such as IMAGENET1K_V1, or random:SEED"
        raise FileNotFoundError(f"weights: no file {weights} ({expected})")


def imported(package: str) -> ModuleType:
    """torchvision.models or timm without ``torch._dynamo``, which takes 2.2 s of the 8 s until a saved detector's first score.

    An operator of torchvision and some functions of timm that no CNN here has name it: a stand-in leaves it to their first use.
    """
    names = ("torch._dynamo", "torch._dynamo.utils")
    stood_in = [ModuleType(name) for name in names if not {package, *names} & sys.modules.keys()]
    if stood_in:
        stood_in[0].disable = lambda f, *_, **__: wraps(f)(lambda *a, **k: torch.compiler.disable(f)(*a, **k))
        stood_in[1].is_compile_supported = lambda device: import_module(names[1]).is_compile_supported(device)
    sys.modules.update((module.__name__, module) for module in stood_in)
    try:
        return import_module(package)
    finally:
        for module in stood_in:
            sys.modules.pop(module.__name__, None)


def is_file(weights: str) -> bool:
    """Whether weights are named as a file, not by a tag or a seed."""
    return Path(weights).suffix.lower() in {".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt"} or "/" in weights


def _seed_of(weights: str) -> int | None:
    if not weights.startswith("random:"):
        return None
    seed = weights.removeprefix("random:")
    require("weights", seed.isdecimal() and len(seed) < 19, "random:SEED with a whole number", weights)
    return int(seed)


def _tag_of(weights: str) -> str | None:
    return None if is_file(weights) or _seed_of(weights) is not None else weights


@lru_cache
def _file_hash(path: str, *_stamp: int) -> str:
    return file_hash(path, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _build(name: str, weights: str, levels: tuple[int, ...]) -> tuple[nn.Module, set[str], tuple]:
    """-> (module that yields the levels' maps, keys of the whole model's state dict, mean and deviation that its weights expect)."""
    models, tag, normal = imported("torchvision.models"), _tag_of(weights), (IMAGENET_MEAN, IMAGENET_STD)
    if name in models.list_models(models, OF_TORCHVISION):
        model = models.get_model(name, weights=None).eval()
        if tag:
            model.load_state_dict(_tagged_weights(name, tag))
        from torchvision.models.feature_extraction import create_feature_extractor

        block = "features.denseblock" if hasattr(model, "features") else "layer"
        there = {level: f"{block}{level}" for level in range(1, 5)}
    else:
        timm = imported("timm")
        from timm.models import create_feature_extractor  # it knows timm's layers that cannot be traced

        named = f"{name}.{tag}" if tag and tag not in DEFAULT_TAGS else name
        try:
            model = timm.create_model(named, pretrained=tag is not None).eval()
        except OSError as error:
            raise OSError(f"weights: {named} of timm could not be fetched ({error}); name a file") from None
        if tag:  # of a file's weights nothing is known, so they are given ImageNet's
            normal = tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])
        there = {level["reduction"].bit_length() - 2: level["module"] for level in getattr(model, "feature_info", [])}
    if unknown := [n for n in levels if n not in there]:
        known = sorted(n for n in there if n > 0)
        raise ValueError(f"layers: {name} has no level {unknown[0]} (stride {2 ** (unknown[0] + 1)}); it has {known}")
    trunk = create_feature_extractor(model, return_nodes={there[n]: str(n) for n in levels})
    return trunk, set(model.state_dict()), normal


def _tagged_weights(name: str, tag: str) -> dict[str, Tensor]:
    """torchvision's published weights, from ``paths.weights_root()`` or fetched into it and hash-checked."""
    published = imported("torchvision.models").get_model_weights(name)[tag]
    file = weights_root() / Path(published.url).name
    if file.is_file():  # torchvision checks what it fetches, not what lies there
        found, expected = file_hash(file, "sha256").hexdigest(), file.stem.rpartition("-")[2]
        advice = f"{name} {tag} as published (sha256 {expected}...); remove {file}, and it is fetched again"
        require("weights", found.startswith(expected), advice, f"a file of sha256 {found[:8]}...")
    try:
        how = {"progress": False, "check_hash": True, "weights_only": True, "map_location": "cpu"}
        return published.get_state_dict(model_dir=str(weights_root()), **how)
    except OSError as error:
        by_hand = f"place {published.url} at {file}, or name a file"
        raise OSError(f"weights: {name} {tag} could not be fetched ({error}); {by_hand}") from None


def _load_file(trunk: nn.Module, full_keys: set[str], path: Path, name: str) -> None:
    """Puts a file's weights into the trunk; raises ValueError where they do not fit."""
    try:
        of_safetensors = path.suffix.lower() == ".safetensors"
        state = load_file(path) if of_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever an unpickler meets in a damaged or foreign file
        raise ValueError(f"weights: {path} is not a plain file of tensors ({type(error).__name__}: {error})") from None
    if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):  # torch does not look at its sums
        raise ValueError(f"weights: {path} is damaged ({part})")
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    named = isinstance(state, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items())
    require(f"weights: {path}", named, "a state dict (names with tensors)", type(state).__name__)
    wanted = trunk.state_dict()
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}
    there = [key for key in wanted if key in state]
    other = [key for key in there if state[key].shape != wanted[key].shape]
    problems = {
        "missing": sorted(set(wanted) - set(state) - counters),
        "unexpected": sorted(set(state) - full_keys - set(wanted)),
        "of another shape": [f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}" for key in other],
        "not dense finite real numbers": [key for key in there if key not in counters and not _is_plain(state[key])],
    }
    first = {what: ", ".join(keys[:5] + ["..."] * (len(keys) > 5)) for what, keys in problems.items()}
    if said := [f"{len(keys)} {what}: {first[what]}" for what, keys in problems.items() if keys]:
        raise ValueError(f"weights: {path} does not fit {name}; {'; '.join(said)}")
    trunk.load_state_dict({key: state[key] for key in there}, strict=False)


def _is_plain(t: Tensor) -> bool:
    return t.layout == torch.strided and t.device.type == "cpu" and t.is_floating_point() and bool(t.isfinite().all())
