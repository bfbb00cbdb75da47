"""The refinement network (Appendix D): coarse score maps in, fine ones out; trained on simulated anomalies only."""

from rcp.refinement.options import RefinementConfig
from rcp.refinement.simulation import Simulation

Refinement = RefinementConfig  # as users know it

__all__ = ["Refinement", "RefinementConfig", "Simulation"]
