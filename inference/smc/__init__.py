"""Sequential Monte Carlo."""

from .bounds import Bounds, evidence_bounds
from .particle_gibbs import ParticleGibbs
from .pmmh import PMMH
from .resampling import Resampler, Tempered
from .smc import SMC
from .smc2 import SMC2
from .steering import Branching, SMCSteering
from .triggers import ESSBelow, EveryK, Trigger

__all__ = [
    "PMMH",
    "SMC",
    "SMC2",
    "Bounds",
    "Branching",
    "ESSBelow",
    "EveryK",
    "ParticleGibbs",
    "Resampler",
    "SMCSteering",
    "Tempered",
    "Trigger",
    "evidence_bounds",
]
