"""Markov chain Monte Carlo over traces."""

from .composition import Cycle, Mixture, Repeat
from .cuts import Cuts, EntropyCuts, SiteCuts, StepCuts, UniformCuts
from .gibbs import Gibbs
from .infill import Infill, SingleSite
from .mcmc import MCMC
from .metropolis import Metropolis
from .moves import Moves
from .numpyro_kernels import HMC, NUTS, NumPyro
from .power_sampling import PowerSampling
from .proposal_program import ProposalProgram
from .proposals import LogRandomWalk, RandomWalk
from .regenerate import Regenerate
from .replica_exchange import ReplicaExchange
from .tempered import Ramp, Tempered

# these build on the modules above
from ..smc.ancestor_sampling import AncestorSampling  # isort: skip
from ..smc.conditional import ConditionalSMC  # isort: skip
from ..smc.pmmh import MarginalMetropolis  # isort: skip

__all__ = [
    "HMC",
    "MCMC",
    "NUTS",
    "AncestorSampling",
    "ConditionalSMC",
    "Cuts",
    "Cycle",
    "EntropyCuts",
    "Gibbs",
    "Infill",
    "LogRandomWalk",
    "MarginalMetropolis",
    "Metropolis",
    "Mixture",
    "Moves",
    "NumPyro",
    "PowerSampling",
    "ProposalProgram",
    "Ramp",
    "RandomWalk",
    "Regenerate",
    "Repeat",
    "ReplicaExchange",
    "SingleSite",
    "SiteCuts",
    "StepCuts",
    "Tempered",
    "UniformCuts",
]
