"""Variational inference: objectives are expectations of what programs say of a guide's traces."""

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
from .expectations import Controlled, Expectation, expectation
from .marginals import Marginal, Normalized, marginal, normalize
from .objectives import chi_squared, elbo, forward_kl, iwae, renyi, sleep_phase, vimco, wake_phase
from .terms import LogDensity
from .traces import Trace

__all__ = [
    "AcceptReject",
    "Controlled",
    "Enumerate",
    "Estimator",
    "Expectation",
    "GumbelSoftmax",
    "LogDensity",
    "Marginal",
    "MeasureValued",
    "Normalized",
    "OneHot",
    "Reparameterised",
    "ScoreFunction",
    "StraightThrough",
    "Trace",
    "chi_squared",
    "elbo",
    "expectation",
    "forward_kl",
    "iwae",
    "log_density",
    "marginal",
    "normalize",
    "renyi",
    "sleep_phase",
    "vimco",
    "wake_phase",
]
