"""Markov chain Monte Carlo over traces."""

from .cuts import Cuts, EntropyCuts, SiteCuts, StepCuts, UniformCuts
from .infill import Infill, SingleSite
from .mcmc import MCMC
from .metropolis import Metropolis
from .moves import Moves
from .power_sampling import PowerSampling
from .proposals import LogRandomWalk, RandomWalk
from .regenerate import Regenerate
from .tempered import Ramp, Tempered

# these build on the modules above
from ..smc.ancestor_sampling import AncestorSampling  # isort: skip
from ..smc.conditional import ConditionalSMC  # isort: skip
from ..smc.pmmh import MarginalMetropolis  # isort: skip

__all__ = [
    "MCMC",
    "AncestorSampling",
    "ConditionalSMC",
    "Cuts",
    "EntropyCuts",
    "Infill",
    "LogRandomWalk",
    "MarginalMetropolis",
    "Metropolis",
    "Moves",
    "PowerSampling",
    "Ramp",
    "RandomWalk",
    "Regenerate",
    "SingleSite",
    "SiteCuts",
    "StepCuts",
    "Tempered",
    "UniformCuts",
]
