"""Resampling schemes: from normalised weights to the ancestor of each particle.

Under each, particle j has N w_j offspring in expectation, and a particle of weight 0 has none. They differ in how much the
numbers of offspring vary: multinomial most, then residual, stratified, systematic and SSP (Douc and Cappe 2005; Gerber,
Chopin and Whiteley 2019, who prove that SSP converges where systematic resampling may not).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


def _at_points(weights: Array, points: Array) -> Array:
    """For each point in [0, 1) of the cumulative weights, whose it is: int32[N]. Never one of weight 0."""
    # float32 prefix sums need not be monotone, and may rise at a weight of 0: only positive weights may move them up
    cumulative = jax.lax.cummax(jnp.where(weights > 0, jnp.cumsum(weights), 0.0))
    ancestors = jnp.searchsorted(cumulative, points * cumulative[-1], side="right")
    last_alive = weights.shape[0] - 1 - jnp.argmax(weights[::-1] > 0)
    return jnp.minimum(ancestors, last_alive).astype(jnp.int32)


def _repeated(offspring: Array) -> Array:
    """Particle j as often as `offspring` (int32[N], summing to N) says: int32[N]."""
    n = offspring.shape[0]
    return jnp.searchsorted(jnp.cumsum(offspring), jnp.arange(n), side="right").astype(jnp.int32)


def multinomial(weights: Array, uniforms: Array) -> Array:
    """Ancestors int32[N] drawn independently (Gordon, Salmond and Smith 1993); needs N uniform numbers."""
    return _at_points(weights, jnp.sort(uniforms))


def stratified(weights: Array, uniforms: Array) -> Array:
    """Ancestors int32[N] at one point in each N-th of the cumulative weights (Kitagawa 1996); needs N uniform numbers."""
    n = weights.shape[0]
    return _at_points(weights, (jnp.arange(n) + uniforms) / n)


def systematic(weights: Array, uniforms: Array) -> Array:
    """Ancestors int32[N] at equal distances (Kitagawa 1996; Douc and Cappe 2005, section 2.4); needs one uniform number.

    Point i is (i + u) / N on the cumulative weights: particle j has floor or ceil of N w_j offspring.
    """
    n = weights.shape[0]
    return _at_points(weights, (jnp.arange(n) + uniforms[0]) / n)


def residual(weights: Array, uniforms: Array) -> Array:
    """Ancestors int32[N]: floor(N w_j) of each, the others drawn from what is left (Liu and Chen 1998); needs N numbers."""
    n = weights.shape[0]
    whole, rest = _parts(weights)
    missing = n - whole.sum()
    drawn = _at_points(jnp.where(missing > 0, rest, weights), uniforms)
    return _repeated(whole.at[drawn].add(jnp.arange(n) < missing))


def ssp(weights: Array, uniforms: Array) -> Array:
    """Ancestors int32[N] by the Srinivasan sampling process (Gerber, Chopin and Whiteley 2019, algorithm 3); needs N numbers.

    One particle at a time keeps an undecided fraction of an offspring. It meets the next: of fractions a and b, one takes
    all of a + b if that is below 1, else one is completed to 1 and the other keeps the rest; who, so that means stay.
    """
    whole, rest = _parts(weights)

    def meet(carry: tuple[Array, Array, Array], other: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array, Array], None]:
        offspring, me, a = carry
        you, b, u = other
        both, over = a + b, a + b >= 1.0
        chance = jnp.where(over, (1 - b) / jnp.maximum(2 - both, 1e-12), a / jnp.maximum(both, 1e-12))
        first = u < chance  # I take all of it, or am completed
        offspring = offspring.at[jnp.where(first, me, you)].add(over.astype(jnp.int32))
        undecided = jnp.where(first == over, you, me)
        return (offspring, undecided, jnp.where(over, both - 1.0, both)), None

    n = weights.shape[0]
    start = (whole, jnp.int32(0), rest[0])
    (offspring, last, _), _ = jax.lax.scan(meet, start, (jnp.arange(1, n), rest[1:], uniforms[1:]))
    # fractions sum to a whole number: what is left is 0 or 1 but for rounding
    return _repeated(offspring.at[last].add(n - offspring.sum()))


def _parts(weights: Array) -> tuple[Array, Array]:
    """The whole numbers int32[N] in N w_j and the fractions float32[N]."""
    expected = weights.shape[0] * weights
    whole = jnp.floor(expected)
    return whole.astype(jnp.int32), expected - whole


class Scheme(NamedTuple):
    """A way to resample."""

    ancestors: Callable[[Array, Array], Array]
    """From normalised weights float32[N] and uniform numbers in [0, 1) to ancestors int32[N]."""
    single: bool = False
    """Whether it needs one uniform number, instead of N."""


SCHEMES = {
    "multinomial": Scheme(multinomial),
    "stratified": Scheme(stratified),
    "systematic": Scheme(systematic, single=True),
    "residual": Scheme(residual),
    "ssp": Scheme(ssp),
}
