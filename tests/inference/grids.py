"""The exact expectation of a gradient estimate: all of its random choices, as points of a grid.

Each choice is drawn from a uniform number by the inverse of its distribution function. Where all probabilities are multiples of
1 / G, uniform numbers in the middle of G equal parts of [0, 1) stand for all, whatever depends on them: the mean over all grids
is the expectation.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latentrace import inference
from latentrace.inference.vi import randomness


class Visits(NamedTuple):
    """How many choices a site makes, and how many paths lead to it."""

    places: int
    """of loops, plates and tokens together"""


def exact_expectation(
    fn: Callable[[Any], Any],
    visits: dict[str, tuple[int, ...]],
    monkeypatch: Any,
    *,
    traces_drawn: int = 1,
    inside: dict[str, tuple[int, ...]] | None = None,
    inside_drawn: int = 1,
    grid: int = 4,
) -> Any:
    """The mean of fn(rng_key) over all random choices of sites that are visited so often (dimensions of loops, plates and
    tokens) by each of `traces_drawn` traces, and of those `inside` the expectation's function."""
    offsets, total = {}, 0
    for level, (sites, count) in enumerate([(visits, traces_drawn), (inside or {}, inside_drawn)]):
        for name, dims in sites.items():
            offsets[level, name] = total, dims
            total += math.prod(dims) * count

    class Grid(NamedTuple):
        rng_key: Any
        trace: Any

        level = 0

        def uniform(self, site: Any, step: Any = None) -> Any:
            path = (*site.path, *([] if step is None else [step]))
            offset, dims = offsets[self.level, site.name]
            place = self.trace
            for index, size in zip(path, dims, strict=True):
                place = place * size + index
            digit = jax.random.key_data(self.rng_key)[-1] // grid ** (offset + place) % grid
            return (digit + 0.5) / grid

        def pick(self, probs: Any, u: Any) -> Any:
            return jnp.clip((jnp.cumsum(probs) < u).sum(), 0, len(probs) - 1)

        def supply(self, spec, active):
            return None

        def enter_element(self, i, jaxpr):
            return self

        def leave_plate(self, size, jaxpr, elements):
            return self

        def value(self, site, distribution, number):
            support = distribution.enumerate_support()
            probs = jnp.exp(jax.vmap(distribution.log_prob)(support))
            if (self.level, site.name) not in offsets:  # enumerated: replaced by whoever enumerates
                return support[0], self
            return support[self.pick(probs, self.uniform(site))], self

        def token(self, site, step, logits, number):
            return self.pick(jax.nn.softmax(logits), self.uniform(site, step)).astype(jnp.int32), self

    class Inside(Grid):
        level = 1

    worlds = grid**total
    assert worlds <= 2**20, f"{worlds} worlds are too many"
    monkeypatch.setattr("latentrace.inference.vi.expectations.Keyed", Grid)
    monkeypatch.setattr("latentrace.inference.vi.marginals.Keyed", Inside)
    monkeypatch.setattr(randomness.Inner, "next_key", lambda self: self.rng_key)
    key_of = lambda world: jax.random.wrap_key_data(jnp.stack([jnp.uint32(0), world.astype(jnp.uint32)]))
    mean = lambda worlds: jax.tree.map(lambda x: x.mean(axis=0), jax.vmap(lambda w: fn(key_of(w)))(worlds))
    size = min(worlds, 4096)
    chunks = jax.jit(lambda: jax.lax.map(mean, jnp.arange(worlds).reshape(-1, size)))()
    return jax.tree.map(lambda x: x.mean(axis=0), chunks)


def enumerated_traces(guide: Any, *args: Any) -> dict[str, Any]:
    """Every trace of a finite guide, by site; leading axis."""
    posterior = inference.Exact().run(jax.random.key(0), guide, *args)
    random = [name for name in posterior.values]
    return {name: getattr(posterior.values[name], "tokens", posterior.values[name]) for name in random}
