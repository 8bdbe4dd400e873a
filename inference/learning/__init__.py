"""Learning: the training loop, and what it trains besides guides: twists and policies."""

from .loop import Fit
from .training import fit
from .update import Shardings

__all__ = [
    "Fit",
    "Shardings",
    "fit",
]
