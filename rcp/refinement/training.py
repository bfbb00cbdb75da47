"""Training of the refinement network on simulated anomalies only (Appendix D); it resumes from a checkpoint."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from rcp.backbone import ALONE
from rcp.checks import require
from rcp.files import read_tensors, write_tensors
from rcp.progress import Log, say
from rcp.refinement.network import RefinementNet, focal_and_l1
from rcp.refinement.options import RefinementConfig
from rcp.refinement.simulation import simulate, without_object

logger = logging.getLogger("rcp")
LIKELY = "likely cause: a learning rate that is too high"


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    images: np.ndarray,
    see: Callable[[np.ndarray, np.ndarray], np.ndarray],
    how: RefinementConfig,
    normal: tuple[float, float],
    textures: np.ndarray | None = None,
    log: Log = say,
    checkpoint: str | Path | None = None,
    device: torch.device | str = "cpu",
    names: Sequence[str | Path] | None = None,
    of: dict | None = None,
) -> tuple[RefinementNet, list[dict]]:
    """Trains a refinement network on simulated anomalies in normal images; -> it, and a row per epoch (loss, anomalous, seconds).

    Every epoch shows each image once, with another anomaly. Draws follow the seeds and the epoch alone, so a run that goes on from
    a checkpoint ends where an uninterrupted one does.

    Args:
        images: (n, S, S, 3) uint8, normal.
        see: (images with a simulated defect, their numbers) -> score maps (n, S, S) float32, as the detector makes them.
        normal: median and MAD of normal patch scores (Eq. 11).
        textures: (m, S, S, 3) uint8, as :meth:`RefinementConfig.load_textures` gives them.
        checkpoint: file that is written after every epoch and read where it exists; none where left out.
        names: of the images, for the notice that nothing stands out from the background of some.
        of: what else the maps depend on, that can be JSON; a checkpoint serves no other.

    Raises:
        ValueError: no textures, images too small, a checkpoint of another training; before any work.
        FloatingPointError: the loss is NaN or infinite; names the epoch.
    """
    simulation = dataclasses.replace(how.simulation, seed=how.simulation.seed + how.seed)
    simulate(images[:1], simulation, textures)  # what is wrong with them is said before any work
    _say_without_object(images, simulation, names)
    with ALONE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        net = RefinementNet(how, center=normal[0], deviation=how.beta * normal[1] or 1.0)
    net = net.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameter_groups(), momentum=how.momentum, weight_decay=how.weight_decay)
    batches = -(-len(images) // how.batch_size)
    full = [group["lr"] for group in optimizer.param_groups]
    content = hashlib.blake2b(images.tobytes()).hexdigest()
    about = json.dumps(how.identity() | {"normal": normal, "images": content, "of": of})
    rows = _resume(checkpoint, net, optimizer, about)
    for epoch in range(len(rows), how.epochs):
        order = np.random.default_rng([how.seed, epoch]).permutation(len(images))
        losses, anomalous, started = [], 0, time.perf_counter()
        for i, chosen in enumerate(np.array_split(order, batches)):
            changed, masks = simulate(images[chosen], simulation, textures, epoch=epoch, numbers=chosen)
            done = (epoch * batches + i) / (how.epochs * batches)
            for group, lr in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = lr * (1 + math.cos(math.pi * done)) / 2
            logits = net(torch.from_numpy(see(changed, chosen)).to(device))
            loss = focal_and_l1(logits, torch.from_numpy(masks).to(device), how)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            anomalous += int(masks.any((1, 2)).sum())
        mean, seconds = torch.stack(losses).mean().item(), round(time.perf_counter() - started, 3)
        if not math.isfinite(mean):
            raise FloatingPointError(f"loss of the refinement is {mean} at epoch {epoch + 1}; {LIKELY}")
        rows.append({"epoch": epoch + 1, "loss": mean, "anomalous": anomalous / len(images), "seconds": seconds})
        _save(checkpoint, net, optimizer, about, rows)
        log(f"refinement epoch {epoch + 1:>3}/{how.epochs}  loss {mean:.5f}  {seconds:.1f} s")
    net.eval().requires_grad_(False)
    if not np.isfinite(net.refine(see(images[:1], np.arange(1)))).all():  # the last step has no loss after it
        raise FloatingPointError(f"the refinement diverged in its last step; {LIKELY}")
    return net, rows


def _say_without_object(images: np.ndarray, simulation, names: Sequence[str | Path] | None) -> None:
    without = without_object(images, simulation).nonzero()[0]
    if len(without):
        first = Path(names[without[0]]).parts[-4:] if names is not None else ("image", str(without[0]))
        logger.warning(
            "foreground: in %d of %d training images nothing, or less than 1 %% of the image, stands out from a plain background "
            "by %g grey levels (first: %s); their simulated defects may lie anywhere. Of a texture that is as it should be; if they "
            "show an object, lower `tolerance`",
            len(without), len(images), simulation.tolerance, "/".join(first),
        )  # fmt: skip


def _save(checkpoint, net: RefinementNet, optimizer: torch.optim.Optimizer, about: str, rows: list) -> None:
    """Everything that the next epoch depends on, under a temporary name first."""
    if checkpoint is None:
        return
    tensors = {f"network.{name}": value for name, value in net.state_dict().items()}
    tensors |= {f"momentum.{i}": optimizer.state[p]["momentum_buffer"] for i, p in enumerate(net.parameters())}
    header = {"format": "rcp-refinement-checkpoint-2", "how": about, "rows": json.dumps(rows)}
    checkpoint = Path(checkpoint)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(checkpoint, tensors, header)


def _resume(checkpoint, net: RefinementNet, optimizer: torch.optim.Optimizer, about: str) -> list[dict]:
    """Puts the state of a checkpoint into network and optimiser; -> its rows, or [] where there is none."""
    if checkpoint is None or not os.path.lexists(checkpoint):
        return []
    require("checkpoint", Path(checkpoint).is_file(), "a file", str(checkpoint))  # a pipe would be waited for
    try:
        header, tensors = read_tensors(checkpoint, "rcp-refinement-checkpoint")
    except ValueError as error:
        aside = Path(checkpoint).with_suffix(".damaged")
        os.replace(checkpoint, aside)
        logger.warning("checkpoint: %s; it is set aside as %s, and the training starts anew", error, aside.name)
        return []
    words = f"one of these options, images and normal scores: {about}; remove it to start anew"
    require("checkpoint", header.get("how") == about, words, str(checkpoint))
    net.load_state_dict({n.removeprefix("network."): v for n, v in tensors.items() if n.startswith("network.")})
    for i, parameter in enumerate(net.parameters()):
        optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{i}"].to(parameter)
    return json.loads(header["rows"])
