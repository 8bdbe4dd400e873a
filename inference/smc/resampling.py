"""Resampling schemes: from normalised weights to the ancestor of each particle and its weight after.

Resampling is unbiased when the weights after of j's offspring sum to w_j in expectation; a particle of weight 0 has none.

- Most schemes give everybody the weight 1/N and particle j N w_j offspring in expectation. They differ in how much that
  number varies: multinomial most, then residual, stratified, systematic and SSP (Douc and Cappe 2005; Gerber, Chopin and
  Whiteley 2019, who prove that SSP converges where systematic resampling may not).
- `Tempered` chooses ancestors by w^a and leaves them the rest of their weight.
- `optimal` chooses some of them without replacement; the large ones keep their weight (see `SMCSteering`).
- "ceil_residual" is biased: its numbers of offspring are not random.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from latentrace.ppl.choices import at_points
from latentrace.ppl.errors import SiteError, near_misses

from .triggers import effective_size

Array = jax.Array


def repeated(offspring: Array) -> Array:
    """Particle j as often as `offspring` (int32[N], summing to N) says: int32[N]."""
    n = offspring.shape[0]
    return jnp.searchsorted(jnp.cumsum(offspring), jnp.arange(n), side="right").astype(jnp.int32)


def multinomial(weights: Array, uniforms: Array) -> Array:
    """Ancestors int32[N] drawn independently (Gordon, Salmond and Smith 1993); needs N uniform numbers."""
    return at_points(weights, jnp.sort(uniforms))


def stratified(weights: Array, uniforms: Array) -> Array:
    """Ancestors int32[N] at one point in each N-th of the cumulative weights (Kitagawa 1996); needs N uniform numbers."""
    n = weights.shape[0]
    return at_points(weights, (jnp.arange(n) + uniforms) / n)


def systematic(weights: Array, uniforms: Array) -> Array:
    """Ancestors int32[N] at equal distances (Kitagawa 1996; Douc and Cappe 2005, section 2.4); needs one uniform number.

    Point i is (i + u) / N on the cumulative weights: particle j has floor or ceil of N w_j offspring.
    """
    n = weights.shape[0]
    return at_points(weights, (jnp.arange(n) + uniforms[0]) / n)


def residual(weights: Array, uniforms: Array) -> Array:
    """Ancestors int32[N]: floor(N w_j) of each, the others drawn from what is left (Liu and Chen 1998); needs N numbers."""
    n = weights.shape[0]
    whole, rest = _parts(weights)
    missing = n - whole.sum()
    drawn = at_points(jnp.where(missing > 0, rest, weights), uniforms)
    return repeated(whole.at[drawn].add(jnp.arange(n) < missing))


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
    return repeated(offspring.at[last].add(n - offspring.sum()))


def _parts(weights: Array) -> tuple[Array, Array]:
    """The whole numbers int32[N] in N w_j and the fractions float32[N]."""
    expected = weights.shape[0] * weights
    whole = jnp.floor(expected)
    return whole.astype(jnp.int32), expected - whole


def ceil_residual(weights: Array, uniforms: Array) -> Array:
    """Ancestors int32[N] by REBASE's rule (Wu, Sun, Li, Welleck and Yang 2024); no number is used. Biased.

    From the heaviest down, each takes its share of the places that are left, rounded up: ceil(left * w_j / sum_{k >= j} w_k).
    The lightest find no place left: traces of small weight are lost for good, and the evidence is no longer unbiased.
    """
    n = weights.shape[0]
    order = jnp.argsort(-weights, stable=True)
    ordered = weights[order]
    remaining = jnp.cumsum(ordered[::-1])[::-1]

    def take(left: Array, mine: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, total = mine
        share = left * weight / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        rounding = jnp.minimum(n * jnp.finfo(jnp.float32).eps * share, 0.5)  # bounds the error of a sum of n weights
        places = jnp.minimum(jnp.ceil(share - rounding).astype(jnp.int32), left)
        return left - places, places

    left, places = jax.lax.scan(take, jnp.int32(n), (ordered, remaining))
    places = places.at[0].add(left)  # none but for rounding
    return repeated(jnp.zeros(n, jnp.int32).at[order].set(places))


def optimal(weights: Array, count: int, uniforms: Array) -> tuple[Array, Array]:
    """Choose at most `count` of M particles without replacement (Fearnhead and Clifford 2003); needs one uniform number.

    With c such that sum_j min(1, c w_j) = count, particle j survives with probability min(1, c w_j), and then weighs
    max(w_j, 1/c): those of weight above 1/c are kept as they are, the others are drawn systematically. Among all unbiased
    choices of `count` particles this one has the least sum of the variances of the weights after. Where no more than `count`
    have a positive weight, all of them are kept and nothing is random.

    Returns who survives, bool[M], and everybody's weight after, float32[M], 0 for those who do not; the weights after sum
    to 1.

    >>> survives, after = optimal(jnp.array([0.1, 0.6, 0.1, 0.2]), 2, jnp.array([0.3]))
    >>> survives.tolist(), after.tolist()  # 0.6 is kept; of the others one is drawn, to stand for all of their 0.4
    ([False, True, True, False], [0.0, 0.6000000238418579, 0.4000000059604645, 0.0])
    """
    m = weights.shape[0]
    order = jnp.argsort(-weights, stable=True)
    ordered, rank = weights[order], jnp.arange(m)
    lighter = jnp.cumsum(ordered[::-1])[::-1]  # the sum of a weight and of all that are no larger
    everybody = (weights > 0).sum() <= count
    # with those before it kept, c = (count - rank) / lighter
    large = (everybody | ((count - rank) * ordered >= lighter)) & (rank < count) & (ordered > 0)
    kept = jnp.zeros(m, bool).at[order].set(large)
    rest = jnp.where(kept, 0.0, weights)
    places = jnp.where(rest.sum() > 0, count - large.sum(), 0)
    drawn = at_points(rest, (rank + uniforms[0]) / jnp.maximum(places, 1))
    survives = kept.at[jnp.where(rank < places, drawn, m)].set(True, mode="drop")
    after = jnp.where(kept, weights, rest.sum() / jnp.maximum(places, 1))
    return survives, jnp.where(survives, after, 0.0)


class Resampled(NamedTuple):
    """A population after resampling."""

    ancestors: Array
    """int32[N]"""
    weights: Array
    """float32[N]: each particle's part of the total weight before"""


class Resampler(Protocol):
    """A way to resample a population. Hashable: it is compiled in."""

    @property
    def single(self) -> bool:
        """Whether it needs one uniform number, instead of N."""
        ...

    @property
    def biased(self) -> bool:
        """Whether the weights after of a particle's offspring sum to something else than its weight in expectation."""
        ...

    def __call__(self, weights: Array, uniforms: Array) -> Resampled:
        """Resample normalised weights float32[N], given uniform numbers in [0, 1)."""
        ...


class Scheme(NamedTuple):
    """A way to resample after which everybody has the same weight."""

    ancestors: Callable[[Array, Array], Array]
    """From normalised weights float32[N] and uniform numbers in [0, 1) to ancestors int32[N]."""
    single: bool = False
    """Whether it needs one uniform number, instead of N."""
    biased: bool = False
    """Whether particle j has other than N w_j offspring in expectation."""

    def __call__(self, weights: Array, uniforms: Array) -> Resampled:
        n = weights.shape[0]
        return Resampled(self.ancestors(weights, uniforms), jnp.full(n, 1 / n))


SCHEMES = {
    "multinomial": Scheme(multinomial),
    "stratified": Scheme(stratified),
    "systematic": Scheme(systematic, single=True),
    "residual": Scheme(residual),
    "ssp": Scheme(ssp),
    "ceil_residual": Scheme(ceil_residual, single=True, biased=True),
}


def scheme_called(name: str) -> Scheme:
    """The scheme of that name; `SiteError` with the near misses where there is none."""
    if name not in SCHEMES:
        raise SiteError(f"SMC: no resampling scheme {name!r}; {near_misses(name, SCHEMES)}")
    return SCHEMES[name]


@dataclass(frozen=True)
class Tempered:
    """Resample by w^a, and leave particles the rest of their weight, so that less diversity is lost where weights are uneven.

    The power a is the largest in [0, 1] for which w^a has an effective sample size of `ess` times the number of particles of
    positive weight, found by bisection. An offspring of particle j, chosen with probability v_j = w_j^a / sum_k w_k^a,
    weighs w_j / (N v_j), which is in proportion to w_j^(1 - a): resampling stays unbiased, as under any v (Liu, Chen and
    Logvinenko 2001, who propose powers of w). A small population then follows early, unreliable weights less greedily, which
    is what entropic particle filtering (arXiv 2510.05825) tempers for.

    Args:
        ess: between 0 and 1, as a part of the particles of positive weight.
        scheme: how ancestors are drawn, by name.

    >>> weights = jnp.array([0.9, 0.05, 0.05, 0.0])
    >>> after = Tempered(ess=0.8)(weights, jnp.array([0.5]))
    >>> after.ancestors.tolist()  # an untempered choice would leave particle 0 alone
    [0, 0, 1, 2]
    """

    ess: float
    scheme: str = "systematic"
    biased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.ess < 1:
            raise SiteError(f"Tempered: ess must be between 0 and 1, a part of the population, not {self.ess}")
        if scheme_called(self.scheme).biased:
            raise SiteError(f"Tempered: scheme {self.scheme!r} is biased; take 'systematic'")

    @property
    def single(self) -> bool:
        return SCHEMES[self.scheme].single

    def __call__(self, weights: Array, uniforms: Array) -> Resampled:
        chosen_by = powered(weights, largest_power(weights, self.ess))
        ancestors = SCHEMES[self.scheme].ancestors(chosen_by, uniforms)
        return Resampled(ancestors, (weights / chosen_by)[ancestors] / weights.shape[0])


def powered(weights: Array, power: Array) -> Array:
    """w^power, normalised, float32[N]; 0 stays 0."""
    risen = jnp.where(weights > 0, weights**power, 0.0)
    return risen / risen.sum()


def largest_power(weights: Array, ess: float) -> Array:
    """The largest power in [0, 1] at which the effective sample size is `ess` times the number of positive weights."""
    return largest(lambda power: effective_size(powered(weights, power)) >= ess * (weights > 0).sum(), jnp.float32(0))


def largest(fits: Callable[[Array], Array], low: Array) -> Array:
    """The largest number float32[] from `low` to 1 that fits, by bisection: `low` fits, and what exceeds one that does not
    does not."""

    def halve(bounds: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bounds
        middle = (low + high) / 2
        fitting = fits(middle)
        return (jnp.where(fitting, middle, low), jnp.where(fitting, high, middle)), None

    bits = jnp.finfo(jnp.float32).nmant + 1
    (found, _), _ = jax.lax.scan(halve, (low, jnp.float32(1)), length=bits)
    return jnp.where(fits(jnp.float32(1)), 1.0, found)
