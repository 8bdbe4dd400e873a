"""Sequential Monte Carlo."""

from .smc import SMC

__all__ = ["SMC"]
