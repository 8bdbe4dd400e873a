"""The sampler of a nested site: how its samples resample among themselves, as particles do."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .choices import Choices, SiteRef, at_points
from .collectives import index
from .lineage import normalised

Array = jax.Array


class Samples(NamedTuple):
    """The policy of the samples of one visit: systematic resampling when their effective sample size is low."""

    ess_threshold: float
    axes: tuple[str, ...]
    site: SiteRef
    """the visit, whose resamplings have random numbers of their own"""
    inside_texts: bool = True

    def __call__(self, choices: Choices, clock: Array, chance: Array, log_weight: Array) -> tuple[Array, Array, Array, Choices]:
        weights, total = normalised(log_weight, self.axes[-1])
        n, me = weights.shape[0], index(self.axes[-1])
        due = (1 / (weights**2).sum() < self.ess_threshold * n) & (total > -jnp.inf)
        uniforms, choices = choices.uniforms(clock, weights, 1, self.site)
        ancestors = at_points(weights, (jnp.arange(n) + uniforms) / n)
        return due, jnp.where(due, ancestors[me], me), jnp.where(due, total - jnp.log(n), log_weight), choices
