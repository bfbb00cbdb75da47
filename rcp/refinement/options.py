"""Hyper-parameters of the refinement network and of its training (Appendix D.1)."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rcp.checks import check_fields, check_names, check_type, limited, require
from rcp.data.layouts import content_hash
from rcp.paths import data_root
from rcp.refinement.simulation import DRAWN, Simulation, check_side, draw_textures, load_textures, texture_files

# No options, for nothing else was measured to be better [?]: the network sees the map of patch scores alone, which carries over best to
# real defects; its output is added to the map; the image score is the maximum of the refined map; the learning rate is annealed to 0.


@dataclass(frozen=True, kw_only=True)
class RefinementConfig:
    """Hyper-parameters of the refinement network and its training (Appendix D.1); immutable, checked on construction.

    simulation: of the anomalies it is trained on; "structure" is the paper's choice (Table S7) [P].
    textures: folder of images for "texture" and "mixture"; "" is DTD in the data folder, "drawn" makes them up (the demo).
    texture_count: textures of that folder that are drawn of, chosen by ``seed``; they are held in memory [?].
    stride: pixels of the image per position of the network's grid, a power of two [?].
    channels: of the residual blocks and of each atrous convolution [?].
    rates: of the parallel atrous convolutions; 6, 12, 18 [I].
    beta: of the normalisation by Eq. 11; 1.4826, with which the median deviation of normal scores is their standard deviation.
    outlier: such deviations at which the map alone has even odds of a defect; 3.5 is Iglewicz and Hoaglin's bound [?].
    epochs, batch_size, momentum: 500, 16, 0.9 [P].
    lr_blocks, lr_head: learning rate of the residual blocks and of the head [I].
    weight_decay: 1e-4 [I].
    focal_gamma: of the focal loss; 4 [I].
    focal_weight, l1_weight: of the two losses; 1 and 0.1. With 1 and 1, as in the paper's source
        DeSTSeg [I], uncertain pixels are pulled to 0, and with them the weak middle of a large defect (bottle gained, transistor lost).
    seed: of the initialisation, the order of the images and, with the simulation's own seed, of the anomalies.

    Raises:
        ValueError: a value outside its range, named.
    """

    simulation: Simulation = field(default_factory=lambda: Simulation(kind="structure"))
    textures: str = ""
    texture_count: int = limited(512, above=0)
    stride: int = 8
    channels: int = limited(32, above=0, most=2**12)
    rates: tuple[int, ...] = (6, 12, 18)
    beta: float = limited(1.4826, above=0)
    outlier: float = limited(3.5, above=0)
    epochs: int = limited(500, above=0)
    batch_size: int = limited(16, above=0)
    lr_blocks: float = limited(0.1, above=0)
    lr_head: float = limited(0.01, above=0)
    momentum: float = 0.9
    weight_decay: float = limited(1e-4, least=0)
    focal_gamma: float = limited(4.0, least=0)
    focal_weight: float = limited(1.0, least=0)
    l1_weight: float = limited(0.1, least=0)
    seed: int = limited(0, least=0)

    def __post_init__(self):
        check_fields(self)
        require("stride", self.stride >= 1 and self.stride.bit_count() == 1, "a power of two", self.stride)
        require("rates", self.rates and min(self.rates) >= 1, "rates from 1, such as (6, 12, 18)", self.rates)
        require("momentum", 0 <= self.momentum < 1, "a momentum from 0 and below 1", self.momentum)

    @classmethod
    def build(cls, **values) -> "RefinementConfig":
        """From named values, those of the simulation among them (``kind``, ``grid``, ...; ``seed`` is the training's)."""
        own = {f.name for f in dataclasses.fields(cls)}
        of_simulation = {f.name for f in dataclasses.fields(Simulation)} - {"seed"}
        check_names("refine: unknown option", values, sorted(own | of_simulation))
        base = check_type("simulation", dict | Simulation, values.pop("simulation", {"kind": "structure"}))
        if isinstance(base, dict):
            check_names("simulation: unknown option", base, sorted(of_simulation | {"seed"}))
            base = Simulation(**base)
        changes = {name: values.pop(name) for name in of_simulation & set(values)}
        return cls(simulation=dataclasses.replace(base, **changes), **values)

    @classmethod
    def of(cls, given: "Refine") -> "RefinementConfig | None":
        """What a detector's ``refine`` may be -> the options of its refinement network, or None.

        Raises:
            ValueError: neither, or an option that is unknown or out of range.
        """
        if given is None or given is False or isinstance(given, cls):
            return given or None
        fits = given is True or isinstance(given, dict)
        require("refine", fits, "True, a Refinement or a dict of its options", given)
        return cls.build(**({} if given is True else {str(name): value for name, value in given.items()}))

    def asdict(self) -> dict:
        """JSON-able values by name; ``build(**asdict())`` gives the same."""
        return dataclasses.asdict(self)

    def identity(self) -> dict:
        """What a training depends on: the options, and the textures by their names and content, not by where they lie."""
        textures = None if self.simulation.kind == "structure" else self.textures
        if textures not in (None, "drawn"):
            textures = content_hash([(f"{f.parent.name}/{f.name}", f) for f in texture_files(self._textures_root())])
        return self.asdict() | {"textures": textures}

    def _textures_root(self) -> Path:
        return Path(self.textures or data_root() / "dtd")

    def load_textures(self, side: int) -> np.ndarray | None:
        """The textures that the simulation draws of: (m, side, side, 3) uint8, or None where it needs none.

        Raises:
            FileNotFoundError, ValueError: as :func:`rcp.refinement.simulation.load_textures`.
        """
        check_side(side, self.simulation)
        if self.simulation.kind == "structure":
            return None
        if self.textures == "drawn":
            return draw_textures(min(DRAWN, self.texture_count), side, self.seed)
        return load_textures(self._textures_root(), side, self.texture_count, self.seed)


Refine = RefinementConfig | dict | bool | None  # what a detector takes
