"""Sequential Monte Carlo."""

from .conditional import ParticleGibbs
from .pmmh import PMMH
from .resampling import Resampler, Tempered
from .smc import SMC
from .steering import Branching, SMCSteering
from .triggers import ESSBelow, EveryK, Trigger

__all__ = ["PMMH", "SMC", "Branching", "ESSBelow", "EveryK", "ParticleGibbs", "Resampler", "SMCSteering", "Tempered", "Trigger"]
