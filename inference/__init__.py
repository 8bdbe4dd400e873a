"""Inference: algorithms that run on any program and return a `Posterior`."""

from . import diagnostics, learning, mcmc, plots, smc, vi
from .anytime import Budget, Checkpoint
from .calibration import simulation_based_calibration, tarp
from .exact import Exact
from .importance import ImportanceSampling
from .mcmc import MCMC
from .posterior import Ledger, Marginal, Posterior
from .smc import PMMH, SMC, SMC2, ParticleGibbs, ResampleMove, SMCSteering, TemperedSMC, WasteFreeSMC

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
