"""Learning: the training loop, and what it trains besides guides: twists and policies."""

from . import policies
from .loop import Fit
from .texts import Refilled, Rollouts, log_probs, mixed_rollouts, rollouts
from .training import fit
from .update import Shardings

__all__ = [
    "Fit",
    "Refilled",
    "Rollouts",
    "Shardings",
    "fit",
    "log_probs",
    "mixed_rollouts",
    "policies",
    "rollouts",
]
