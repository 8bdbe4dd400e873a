"""Sequential Monte Carlo."""

from .bounds import Bounds, evidence_bounds
from .ladder import Ladder, Rung
from .particle_gibbs import ParticleGibbs
from .pmmh import PMMH
from .rejuvenation import ResampleMove
from .resampling import Resampler, Tempered
from .smc import SMC
from .smc2 import SMC2
from .steering import Branching, SMCSteering
from .tempering import TemperedSMC
from .triggers import ESSBelow, EveryK, Trigger
from .waste_free import WasteFreeSMC

__all__ = [
    "PMMH",
    "SMC",
    "SMC2",
    "Bounds",
    "Branching",
    "ESSBelow",
    "EveryK",
    "Ladder",
    "ParticleGibbs",
    "ResampleMove",
    "Resampler",
    "Rung",
    "SMCSteering",
    "Tempered",
    "TemperedSMC",
    "Trigger",
    "WasteFreeSMC",
    "evidence_bounds",
]
