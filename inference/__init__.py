"""Inference: algorithms that run on any program and return a `Posterior`."""

from . import diagnostics, mcmc, plots, smc
from .anytime import Budget, Checkpoint
from .calibration import simulation_based_calibration, tarp
from .exact import Exact
from .importance import ImportanceSampling
from .mcmc import MCMC
from .posterior import Ledger, Marginal, Posterior
from .smc import PMMH, SMC, SMC2, ParticleGibbs, ResampleMove, SMCSteering, TemperedSMC, WasteFreeSMC

from . import learning, vi  # isort: skip  (made of all the others)

__all__ = [
    "MCMC",
    "PMMH",
    "SMC",
    "SMC2",
    "Budget",
    "Checkpoint",
    "Exact",
    "ImportanceSampling",
    "Ledger",
    "Marginal",
    "ParticleGibbs",
    "Posterior",
    "ResampleMove",
    "SMCSteering",
    "TemperedSMC",
    "WasteFreeSMC",
    "diagnostics",
    "learning",
    "mcmc",
    "plots",
    "simulation_based_calibration",
    "smc",
    "tarp",
    "vi",
]
