"""Inference: algorithms that run on any program and return a `Posterior`."""

from .exact import Exact
from .importance import ImportanceSampling
from .posterior import Ledger, Marginal, Posterior
from .smc import SMC

__all__ = ["SMC", "Exact", "ImportanceSampling", "Ledger", "Marginal", "Posterior"]
