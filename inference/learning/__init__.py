"""Learning: the training loop, and what it trains besides guides: twists and policies."""

from . import policies
from .examples import Contrast, TwistExamples, draw_examples, examples_of
from .loop import Fit
from .texts import Refilled, Rollouts, log_probs, mixed_rollouts, rollouts
from .training import fit
from .twists import AcceptanceTwist, acceptance_loss, contrastive_twist_loss, density_ratio_loss, soft_value_loss
from .update import Shardings

__all__ = [
    "AcceptanceTwist",
    "Contrast",
    "Fit",
    "Refilled",
    "Rollouts",
    "Shardings",
    "TwistExamples",
    "acceptance_loss",
    "contrastive_twist_loss",
    "density_ratio_loss",
    "draw_examples",
    "examples_of",
    "fit",
    "log_probs",
    "mixed_rollouts",
    "policies",
    "rollouts",
    "soft_value_loss",
]
