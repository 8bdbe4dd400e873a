"""Learning: the training loop, and what it trains besides guides: twists and policies."""

from . import policies
from .texts import Refilled, Rollouts, log_probs, mixed_rollouts, rollouts

__all__ = [
    "Refilled",
    "Rollouts",
    "log_probs",
    "mixed_rollouts",
    "policies",
    "rollouts",
]
