"""Where randomness comes from: every random choice of every algorithm passes through one small interface.

`Keyed` draws with pseudo-random numbers. Enumeration supplies the values instead, and tests replace the draws of an
algorithm by all their outcomes.
"""

import zlib
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


class SiteRef(NamedTuple):
    """One visit of a site."""

    name: str
    path: tuple[Any, ...] = ()
    """int32[] index of each enclosing loop or plate, outermost first, and the number of a draw within a search"""


class Spec(NamedTuple):
    """The finite set of values of a site: `digits` digits of the given radix."""

    digits: int
    radix: int


class Choices(Protocol):
    """A source of choices. It is a pytree, carried from site to site; methods that choose return the next one."""

    def supply(self, spec: Spec | None, active: Any) -> tuple[Array, Array, "Choices"] | None:
        """Digits int32[digits] of a site whose value is enumerated, and whether they are canonical; None to draw it."""
        ...

    def value(self, site: SiteRef, dist: Any, number: Array) -> tuple[Any, "Choices"]:
        """A draw from a distribution: active choice number `number` (int32[], from 0) of the trace, if it is active."""
        ...

    def token(self, site: SiteRef, step: Array, logits: Array, number: Array) -> tuple[Array, "Choices"]:
        """A token int32[] drawn from logits float32[V]; `number` is that of this choice, as in `value`."""
        ...

    def uniforms(self, clock: Array, weights: Array, count: int, site: SiteRef | None = None) -> tuple[Array, "Choices"]:
        """Uniform numbers in [0, 1), float32[count], the same for all particles, for resampling `weights` float32[N]; or for
        one particle's samples at a nested site, the same for all of these."""
        ...

    def enter_element(self, i: Array, jaxpr: Any) -> "Choices":
        """The choices of element `i` of a plate whose body is `jaxpr`; enumerated ones reserve digits for each element."""
        ...

    def leave_plate(self, size: int, jaxpr: Any, elements: Any) -> "Choices":
        """The choices after a plate of `size` elements, from those before it; `elements` are those that each element ended
        with, on a leading axis."""
        ...


class Keyed(NamedTuple):
    """Pseudo-random choices: each draw is keyed by (run key, particle, site, loop indices, step)."""

    run_key: Array
    particle: Array
    """int32[]: number of this particle in the whole run, whatever chunk it is in"""

    def supply(self, spec: Spec | None, active: Any) -> None:
        return None

    def enter_element(self, i: Array, jaxpr: Any) -> "Keyed":
        return self

    def leave_plate(self, size: int, jaxpr: Any, elements: Any) -> "Keyed":
        return self

    def site_key(self, site: SiteRef) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(self.run_key, self.particle), zlib.crc32(site.name.encode()))
        for index in site.path:
            key = jax.random.fold_in(key, index)
        return key

    def value(self, site: SiteRef, dist: Any, number: Array) -> tuple[Any, "Keyed"]:
        return dist.sample(self.site_key(site)), self

    def token(self, site: SiteRef, step: Array, logits: Array, number: Array) -> tuple[Array, "Keyed"]:
        u = jax.random.uniform(jax.random.fold_in(self.site_key(site), step))
        return inverse_cdf(jnp.exp(logits - logits.max()), u), self

    def uniforms(self, clock: Array, weights: Array, count: int, site: SiteRef | None = None) -> tuple[Array, "Keyed"]:
        # particles are numbered from 0, so the largest number is free for what all of them share
        shared = jax.random.fold_in(self.run_key, 0xFFFFFFFF) if site is None else self.site_key(site)
        return jax.random.uniform(jax.random.fold_in(shared, clock), (count,)), self


WHOLE = 2**31 - 1
"""as a cut: after every choice"""


def visited(tree: Any, site: SiteRef) -> Any:
    """Of arrays with leading axes for loops and plates, what belongs to one visit of a site."""
    for index in site.path:
        tree = jax.tree.map(lambda x, i=index: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)
    return tree


class Repeating:
    """What choices that repeat some of a trace and draw the others have in common: a field `drawn`, and `_kept`.

    By itself it repeats nothing and passes on what is drawn.
    """

    drawn: Choices
    _replace: Any

    def _kept(self, site: SiteRef, drawn: Array, number: Array, step: Array | None = None) -> Array:
        """The trace's value where it is repeated, else what was drawn."""
        return drawn

    def supply(self, spec: Spec | None, active: Any) -> None:
        return None

    def value(self, site: SiteRef, dist: Any, number: Array) -> tuple[Any, Any]:
        value, drawn = self.drawn.value(site, dist, number)
        return self._kept(site, value, number), self._replace(drawn=drawn)

    def token(self, site: SiteRef, step: Array, logits: Array, number: Array) -> tuple[Array, Any]:
        token, drawn = self.drawn.token(site, step, logits, number)
        return self._kept(site, token, number, step), self._replace(drawn=drawn)

    def uniforms(self, clock: Array, weights: Array, count: int, site: SiteRef | None = None) -> tuple[Array, Any]:
        uniforms, drawn = self.drawn.uniforms(clock, weights, count)  # nested sites that resample cannot be repeated
        return uniforms, self._replace(drawn=drawn)

    def enter_element(self, i: Array, jaxpr: Any) -> Any:
        return self._replace(drawn=self.drawn.enter_element(i, jaxpr))

    def leave_plate(self, size: int, jaxpr: Any, elements: Any) -> Any:
        return self._replace(drawn=self.drawn.leave_plate(size, jaxpr, elements.drawn))


class _Retained(NamedTuple):
    drawn: Choices
    values: dict[str, Array]
    """for each random site its value in the trace, token ids for a text; leading axes for loops and plates. Sites of rollouts,
    which no trace holds, draw"""
    cut: Array
    """int32[]: how many active choices are repeated, the first ones in the order of the walk; 0 draws all, `WHOLE` none"""


class Retained(Repeating, _Retained):
    """The choices of a particle that repeats a given trace up to a cut, as if it were drawn, and draws what follows."""

    __slots__ = ()

    def _kept(self, site: SiteRef, drawn: Array, number: Array, step: Array | None = None) -> Array:
        if site.name not in self.values:
            return drawn
        value = visited(self.values[site.name], site)
        return jnp.where(number < self.cut, (value if step is None else value[step]).astype(drawn.dtype), drawn)


def at_points(weights: Array, points: Array) -> Array:
    """For each point in [0, 1) of the cumulative weights, whose it is: int32[N]. Never one of weight 0."""
    # float32 prefix sums need not be monotone, and may rise at a weight of 0: only positive weights may move them up
    cumulative = jax.lax.cummax(jnp.where(weights > 0, jnp.cumsum(weights), 0.0))
    ancestors = jnp.searchsorted(cumulative, points * cumulative[-1], side="right")
    last_alive = weights.shape[0] - 1 - jnp.argmax(weights[::-1] > 0)
    return jnp.minimum(ancestors, last_alive).astype(jnp.int32)


def inverse_cdf(weights: Array, u: Array, width: int = 256) -> Array:
    """The index int32[] at which the cumulative sum of `weights` (float32[V], not normalised) passes `u` times its total.

    Never an index of weight 0. Sums over runs of `width` come first, so that only one run is ever accumulated: a full
    cumulative sum over a large vocabulary costs more than the rest of the draw.
    """
    if weights.shape[0] <= width:
        return _pass(weights, u * weights.sum())[0]
    runs = jnp.pad(weights, (0, -weights.shape[0] % width)).reshape(-1, width)
    sums = runs.sum(-1)
    run, rest = _pass(sums, u * sums.sum())
    index, _ = _pass(runs[run], rest)
    return run * width + index


def _pass(weights: Array, target: Array) -> tuple[Array, Array]:
    """The first index at which the cumulative sum exceeds `target`, and what of `target` is left there."""
    cumulative = jnp.cumsum(weights)
    last_positive = weights.shape[0] - 1 - jnp.argmax(weights[::-1] > 0)
    index = jnp.minimum((cumulative <= target).sum(), last_positive).astype(jnp.int32)
    # rounding can stop on a weight of 0 when target falls on a boundary: move on to the next positive one
    positive = (jnp.arange(weights.shape[0]) >= index) & (weights > 0)
    index = jnp.argmax(positive).astype(jnp.int32)
    return index, target - (cumulative[index] - weights[index])
