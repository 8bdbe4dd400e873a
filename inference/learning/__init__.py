"""Learning: the training loop, and what it trains besides guides: twists and policies."""

from .examples import Contrast, TwistExamples, draw_examples, examples_of
from .loop import Fit
from .training import fit
from .twists import AcceptanceTwist, acceptance_loss, contrastive_twist_loss, density_ratio_loss, soft_value_loss
from .update import Shardings

__all__ = [
    "AcceptanceTwist",
    "Contrast",
    "Fit",
    "Shardings",
    "TwistExamples",
    "acceptance_loss",
    "contrastive_twist_loss",
    "density_ratio_loss",
    "draw_examples",
    "examples_of",
    "fit",
    "soft_value_loss",
]
