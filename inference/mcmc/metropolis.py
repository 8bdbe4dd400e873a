"""Metropolis-Hastings moves of `sample` sites, with the rest of the trace as it is."""

from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp

from ..chains import Draw, Info, Kernel, State, Target, added
from .proposals import ValueProposal

Array = jax.Array
T = TypeVar("T")


@dataclass(frozen=True)
class Metropolis(Kernel):
    """A kernel that proposes values of some sites, and accepts them with the probability of Hastings (1970), equation 2.

    Each step evaluates the density of two traces, one pass through the language model for each text of them. Values under which
    other random choices would appear or vanish are rejected: these would have to be drawn too.

    >>> from latentrace.inference.mcmc import Metropolis, RandomWalk
    >>> Metropolis(RandomWalk(theta=0.3)).sites
    ('theta',)
    """

    proposal: ValueProposal

    @property
    def sites(self) -> tuple[str, ...]:
        return self.proposal.sites

    def init(self, target: Target, rng_key: Array, draw: Draw) -> State:
        return State(draw)

    def step(self, target: Target, rng_key: Array, state: State) -> tuple[State, Info]:
        draw, info = self.move(target, rng_key, state.draw)
        return State(draw), info

    def move(self, target: Target, rng_key: Array, draw: Draw) -> tuple[Draw, Info]:
        """The draw after one step."""
        propose_key, accept_key = jax.random.split(rng_key)
        values = target.choices(draw)
        moved, log_ratio = self.proposal.propose(propose_key, {name: values[name] for name in self.proposal.sites})
        now, log_now, info = target.evaluate(values)
        then, log_then, more = target.evaluate({**values, **moved})
        log_ratio = jnp.where(target.same_choices(now, then), log_ratio, -jnp.inf)
        accept = accepts(accept_key, log_then - log_now + log_ratio)
        return choose(accept, then, now), added(info, more._replace(accepted=accept.astype(jnp.float32)))


def accepts(rng_key: Array, log_ratio: Array) -> Array:
    """bool, as many as `log_ratio`: true with probability min(1, exp(log_ratio)); never for NaN."""
    return jnp.log1p(-jax.random.uniform(rng_key, jnp.shape(log_ratio))) < log_ratio


def choose(accept: Array, then: T, now: T) -> T:
    """`then` if accepted, else `now`."""
    return jax.tree.map(lambda a, b: jnp.where(accept, a, b), then, now)  # type: ignore[no-any-return]
