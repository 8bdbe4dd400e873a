"""Variational inference: objectives are expectations of what programs say of a guide's traces."""

from .autoguide import AutoGuide
from .bounds import evidence_bounds
from .density import log_density
from .estimators import (
    AcceptReject,
    Enumerate,
    Estimator,
    GumbelSoftmax,
    MeasureValued,
    OneHot,
    Reparameterised,
    ScoreFunction,
    StraightThrough,
)
from .expectations import Controlled, Expectation, expectation, mean_over
from .implicit import flow, implicit
from .marginals import Marginal, Normalized, marginal, normalize
from .objectives import chi_squared, elbo, forward_kl, importance_weights, iwae, renyi, sleep_phase, vimco, wake_phase
from .smc_posterior import SMCPosterior, smc_posterior
from .terms import LogDensity
from .traces import Trace
from .watched import Loss, loss

__all__ = [
    "AcceptReject",
    "AutoGuide",
    "Controlled",
    "Enumerate",
    "Estimator",
    "Expectation",
    "GumbelSoftmax",
    "LogDensity",
    "Loss",
    "Marginal",
    "MeasureValued",
    "Normalized",
    "OneHot",
    "Reparameterised",
    "SMCPosterior",
    "ScoreFunction",
    "StraightThrough",
    "Trace",
    "chi_squared",
    "elbo",
    "evidence_bounds",
    "expectation",
    "flow",
    "forward_kl",
    "implicit",
    "importance_weights",
    "iwae",
    "log_density",
    "loss",
    "marginal",
    "mean_over",
    "normalize",
    "renyi",
    "sleep_phase",
    "smc_posterior",
    "vimco",
    "wake_phase",
]
