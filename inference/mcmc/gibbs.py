"""Gibbs sampling of finite discrete sites: each element is drawn from its exact full conditional."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl.errors import SiteError
from latentrace.ppl.sites import generate_p, sample_p
from latentrace.ppl.staging import trace_eqns
from latentrace.ppl.state import spread_over

from ..chains import Draw, Info, Kernel, State, Target, at_once

Array = jax.Array
VALUES = "values"
"""the axis of an element's values"""


class Elements(NamedTuple):
    """What a site's elements may be."""

    support: tuple[float, ...]
    dims: tuple[int, ...]
    """of its loops and plates"""
    shape: tuple[int, ...]
    """of its value in each"""

    @property
    def number(self) -> int:
        return math.prod((*self.dims, *self.shape))


@dataclass(frozen=True, init=False)
class Gibbs(Kernel):
    """A kernel that draws finite discrete sites, element after element, from their distribution given all else.

    A step visits each active element of each site once: sites in the order in which they are named (or stand in the program),
    the elements of one in loops, plates and batches in their order. Densities are evaluated for all of an element's values,
    side by side: a step of E elements of K values costs E K of them, each with a pass through the language model for every
    text. Texts stay as they are, and what they are worth under the new value counts: the value of a strategy that a text was
    written by is drawn by how well it explains the text.

    A value under which other random choices would appear or vanish (it decides on a branch that holds some) is left out, since
    these would have to be drawn too: combine with `mcmc.Regenerate` where that matters.

    Args:
        sites: names of `sample` sites with a finite support; all of them where none is named.
        metropolised: propose another value each time, in proportion to its probability (Liu 1996): value i goes to j with
            probability min(p_j / (1 - p_i), p_j / (1 - p_j)). It moves more often, and estimates vary less.

    `Info.accepted` is the probability to move of a proposal, averaged over elements, 1 unless `metropolised`;
    `stats["changed"]` (float32[]) is the part of the active elements that have another value than before.

    Raises `SiteError` for texts, and for sites without a finite support that is known before the run.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> from latentrace.inference import mcmc
    >>> @ppl.program
    ... def two_coins():
    ...     a, b = ppl.sample("a", dist.Bernoulli(0.5)), ppl.sample("b", dist.Bernoulli(0.2))
    ...     ppl.factor("alike", 1.0 * (a == b))
    >>> posterior = inference.MCMC(mcmc.Gibbs(), num_samples=500, num_chains=4).run(jax.random.key(0), two_coins)
    >>> exact = inference.Exact().run(jax.random.key(0), two_coins)
    >>> abs(posterior.expectation("b") - exact.expectation("b")) < 0.1
    np.True_
    """

    names: tuple[str, ...]
    metropolised: bool

    def __init__(self, *sites: str, metropolised: bool = False):
        object.__setattr__(self, "names", sites)
        object.__setattr__(self, "metropolised", metropolised)

    @property
    def sites(self) -> tuple[str, ...]:
        return self.names

    def check(self, target: Target) -> None:
        elements(target, self.names)

    def init(self, target: Target, rng_key: Array, draw: Draw) -> State:
        return State(draw)

    def step(self, target: Target, rng_key: Array, state: State) -> tuple[State, Info]:
        draw, parts = state.draw, []
        for name, site in elements(target, self.names).items():
            rng_key, site_key = jax.random.split(rng_key)
            keys = jax.random.split(site_key, site.number)
            visit = lambda draw, at, name=name, site=site: self.visit(target, at[1], draw, name, site, at[0])
            draw, info = jax.lax.scan(visit, draw, (jnp.arange(site.number), keys))
            parts.append(info)
        whole = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
        visited = jnp.maximum(whole.stats["active"].sum(), 1)
        counts = jax.tree.map(lambda x: x.sum(axis=0), whole.counts)
        faults = jax.tree.map(lambda x: x.max(axis=0), whole.faults)
        changed = whole.stats["changed"].sum() / visited
        still = (~whole.stats["active"]).all()
        accepted = jnp.where(still, 1.0, whole.accepted.sum() / visited)
        return State(draw), Info(accepted, faults, counts, {"changed": changed})

    def visit(self, target: Target, rng_key: Array, draw: Draw, name: str, site: Elements, at: Array) -> tuple[Draw, Info]:
        """The trace after a move of element number `at` of a site; an inactive element is left alone."""
        draws, log_density, info = self.candidates(target, draw, name, site, at)
        values = draw.values[name]
        now = element(values, at) == jnp.asarray(site.support)
        row = moves(log_density, now, self.metropolised)
        which = jax.random.categorical(rng_key, jnp.log(row))
        active = element(jnp.broadcast_to(spread_over(draw.active[name], values), values.shape), at)
        after = jax.tree.map(lambda x, y: jnp.where(active, x[which], y), draws, draw)
        moving = 1 - jnp.where(now, row, 0.0).sum() if self.metropolised else jnp.float32(1)
        stats = {"active": active, "changed": active & ~now[which]}
        return after, info._replace(accepted=jnp.where(active, moving, 0.0), stats=stats)

    def candidates(self, target: Target, draw: Draw, name: str, site: Elements, at: Array) -> tuple[Draw, Array, Info]:
        """The trace with each value of an element, its log density float32[K], and what that cost."""
        values, support = target.choices(draw), jnp.asarray(site.support).astype(draw.values[name].dtype)
        beside = target._replace(beside=(*target.beside, VALUES))

        def one(value: Array) -> tuple[Draw, Array, Info]:
            changed = values[name].reshape(-1).at[at].set(value).reshape(values[name].shape)
            then, log_density, info = beside.evaluate({**values, name: changed})
            return then, jnp.where(target.same_choices(draw, then), log_density, -jnp.inf), info

        draws, log_density, info = jax.vmap(one, axis_name=VALUES)(support)
        faults = jax.tree.map(lambda x: x.max(axis=0), info.faults)
        return draws, log_density, info._replace(faults=faults, counts=at_once(info.counts))


def moves(log_density: Array, now: Array, metropolised: bool) -> Array:
    """float32[K]: the probability to go from the value marked in `now`, bool[K], to each."""
    if not metropolised:
        return jax.nn.softmax(log_density)
    itself = jnp.eye(len(now), dtype=bool)
    # log (1 - p_j) of each, up to the constant of p
    log_others = jax.nn.logsumexp(jnp.where(itself, -jnp.inf, log_density[None]), axis=1)
    leaving = jnp.where(now, log_others, -jnp.inf).max()
    there = jnp.exp(log_density - jnp.maximum(leaving, log_others))
    row = jnp.where(now | (log_density == -jnp.inf), 0.0, there)
    return jnp.where(now, jnp.maximum(1 - row.sum(), 0.0), row)


def elements(target: Target, names: tuple[str, ...]) -> dict[str, Elements]:
    """The sites that `names` says, in its order; all with a finite support, in the program's, where it is empty."""
    supports: dict[str, tuple[float, ...] | None] = {}
    for eqn in trace_eqns(target.staged.jaxpr):
        name, p = eqn.params.get("name"), eqn.params
        if eqn.primitive is sample_p and name in target.random:
            known, here = supports.get(name, ()), p["support"]
            supports[name] = None if known is None or here is None else tuple(dict.fromkeys((*known, *here)))
    texts = [name for name in target.random if target.staged.sites[name].kind == generate_p.name]
    for name in names:
        if name in texts:
            raise SiteError(f"Gibbs: site {name!r} is a text; move it by mcmc.Regenerate in a cycle")
        if supports[name] is None:
            raise SiteError(
                f"Gibbs: site {name!r} has no finite support that is known before the run; take mcmc.NUTS for a "
                "continuous one, or mcmc.Regenerate"
            )
    chosen = names or tuple(name for name, support in supports.items() if support is not None)
    if not chosen:
        raise SiteError(
            "Gibbs: the program has no random site with a finite support that is known before the run; take mcmc.NUTS for "
            "continuous sites, mcmc.Regenerate for texts"
        )
    sites = target.staged.sites
    return {name: Elements(supports[name], sites[name].dims, sites[name].out[0]) for name in chosen}  # type: ignore


def element(values: Array, at: Array) -> Array:
    return values.reshape(-1)[at]
