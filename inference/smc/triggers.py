"""Triggers: when a population resamples.

A trigger is asked before a draw if weights have moved since it was asked last: at sites, and inside texts that have a
constraint, a proposal or a twist of their own. It sees the weights and nothing that is drawn later, so the estimate of the
evidence is unbiased under every trigger (Whiteley, Lee and Heine 2016, "On the role of interaction in sequential Monte Carlo
algorithms").
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from latentrace.ppl.errors import SiteError

Array = jax.Array


class Trigger(Protocol):
    """When to resample. Hashable: it is compiled in."""

    def __call__(self, chance: Array, weights: Array) -> Array:
        """Whether to resample now, bool[], given how often it was asked before (int32[]) and normalised weights float32[N]."""
        ...


def effective_size(weights: Array) -> Array:
    """The effective sample size 1 / sum_j w_j^2 of normalised weights float32[N] (Kong, Liu and Wong 1994): float32[]."""
    return 1 / (weights**2).sum()


@dataclass(frozen=True)
class ESSBelow:
    """Resample when the effective sample size falls below `threshold` times the number of particles.

    A threshold of 0 never resamples, one above 1 always.

    >>> import jax.numpy as jnp
    >>> bool(ESSBelow(0.5)(0, jnp.array([0.9, 0.1, 0.0, 0.0])))  # an effective size of 1.2 out of 4
    True
    """

    threshold: float

    def __call__(self, chance: Array, weights: Array) -> Array:
        return effective_size(weights) < self.threshold * weights.shape[0]


@dataclass(frozen=True)
class EveryK:
    """Resample every k-th time that the population could; `EveryK(1)` resamples each time.

    The population could resample where a draw follows a movement of weights: for a text with a constraint, a proposal or a
    twist that is before each of its tokens, for a loop that draws once and weighs once it is each step.

    >>> [bool(EveryK(3)(chance, None)) for chance in range(6)]
    [False, False, True, False, False, True]
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise SiteError(f"EveryK: k must be at least 1, not {self.k}; 1 resamples each time")

    def __call__(self, chance: Array, weights: Array) -> Array:
        return jnp.asarray(chance % self.k == self.k - 1)


EACH_TIME = EveryK(1)
