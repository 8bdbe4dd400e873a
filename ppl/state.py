"""What a particle carries from site to site, and how its weight moves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .arena import Arena
from .choices import Choices
from .credit import Credit

Array = jax.Array


class Faults(NamedTuple):
    """What went wrong, as site numbers (-1: nothing). Read on the host when the run is over."""

    died: Array
    """int32[]: site at which this particle's weight last became 0"""
    died_at: Array
    """int32[]: the clock then"""
    non_finite: Array
    bound: Array
    overflow: Array
    restricted: Array
    """bool[]: whether a proposal left out tokens that the model allows"""


class Counts(NamedTuple):
    """Work done by this particle's place in the population; int32[] each."""

    generated: Array
    scored: Array
    model_calls: Array
    """passes through a model, the same for all particles"""
    potentials: Array


class Resamplings(NamedTuple):
    """The latest C resamplings of the population: number r is in slot r % C, and those before them are kept as one map."""

    ancestors: Array
    """int32[C]: this place's ancestor in each. It belongs to the place and never moves"""
    clocks: Array
    """int32[C]: the clock at each, the same for all particles"""
    total: Array
    """int32[]: how many there were, merged ones included, the same for all particles"""
    before: Array
    """int32[]: the ancestor at the start of the run of whoever had this place before the oldest one kept"""


class State(NamedTuple):
    choices: Choices
    log_weight: Array
    """float32[], nats: log of target over proposal, twists left out; after a resampling it keeps the mean weight, so that
    the mean of exp(log_weight) over particles estimates the evidence at any time"""
    log_twists: dict[str, Array]
    arenas: tuple[Arena, ...]
    faults: Faults
    counts: Counts
    clock: Array
    """int32[]: how often weights have moved, the same for all particles"""
    asked: Array
    """int32[]: the clock when the population could last resample"""
    chances: Array
    """int32[]: how often it could so far, weights having moved in between"""
    root: Array
    """int32[]: this particle's ancestor at the start of the run"""
    offset: Array
    """float32[], nats: `log_weight` less the log of target over proposal of this particle's own path; resampling changes it"""
    made: Array
    """int32[]: how many active random choices this particle's trace has so far: values, tokens, and plates, whose elements
    choose side by side"""
    same: Array | None = None
    """bool[]: whether all that contexts have read so far is what the walk before read, so that the caches hold it; None where
    there was no walk before"""
    resamplings: Resamplings | None = None
    """None where nobody asks for them"""
    credit: Credit | None = None
    """None where nobody asks for it"""


class Tempering(NamedTuple):
    """Another target of the same program: p(texts)^sharpness times p(values) times (all else)^power."""

    sharpness: Array
    """float32[], positive: of the model's density of generated texts"""
    power: Array
    """float32[], 0 or more: of `observe`, `factor`, `condition` and `score`; what is impossible stays so at 0"""

    def sharpen(self, log_p: Array) -> Array:
        """The log density of generated tokens; what is impossible stays so."""
        return jnp.where(log_p == -jnp.inf, -jnp.inf, self.sharpness * log_p)

    def weigh(self, log_weight: Array) -> Array:
        """The log-weight of a site that the power is for."""
        return jnp.where(log_weight == -jnp.inf, -jnp.inf, self.power * log_weight)


def spread_over(mask: Array, x: Array) -> Array:
    """A mask of leading axes of `x`, in a shape that broadcasts to it."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def with_arena(state: State, model: int, arena: Arena) -> State:
    """The state with another arena for one model."""
    return state._replace(arenas=(*state.arenas[:model], arena, *state.arenas[model + 1 :]))


def no_faults() -> Faults:
    none = jnp.int32(-1)
    return Faults(none, none, none, none, none, jnp.asarray(False))


def together(faults: Faults) -> Faults:
    """What went wrong for any of several particles or elements (leading axis); the last death counts."""
    latest = jnp.argmax(faults.died_at)
    return Faults(*(x.max(axis=0) for x in faults))._replace(died=faults.died[latest])


def no_counts() -> Counts:
    zero = jnp.int32(0)
    return Counts(zero, zero, zero, zero)


def choose(state: State, active: Any) -> State:
    """One more choice, where it is active."""
    return state._replace(made=state.made + jnp.asarray(active).astype(jnp.int32))


def total_twist(state: State) -> Array:
    return sum((t.sum() for t in state.log_twists.values()), jnp.float32(0))


def pay(state: State, site: int, log_weight: Array, active: Any) -> State:
    """Move this particle's log-weight where it is active. NaN and +inf are noted, and count as impossible."""
    wrong, alive = jnp.isnan(log_weight) | (log_weight == jnp.inf), state.log_weight > -jnp.inf
    paid = jnp.where(active, jnp.where(wrong, -jnp.inf, log_weight), 0.0).astype(jnp.float32)
    after = state.log_weight + paid
    dies = alive & (after == -jnp.inf)
    faults = state.faults._replace(
        died=jnp.where(dies, site, state.faults.died),
        died_at=jnp.where(dies, state.clock, state.faults.died_at),
        non_finite=jnp.where(active & wrong & alive, site, state.faults.non_finite),
    )
    credit = None if state.credit is None else state.credit.book(paid)
    return state._replace(log_weight=after, faults=faults, credit=credit)


def steer(state: State, name: str, site: int, log_psi: Array, active: Any) -> State:
    """Set a twist where this particle is active."""
    wrong, alive = jnp.isnan(log_psi) | (log_psi == jnp.inf), state.log_weight > -jnp.inf
    twist = jnp.where(active, jnp.where(wrong, -jnp.inf, log_psi), state.log_twists[name]).astype(jnp.float32)
    faults = state.faults._replace(non_finite=jnp.where(active & wrong & alive, site, state.faults.non_finite))
    return state._replace(log_twists={**state.log_twists, name: twist}, faults=faults)


def note_overflow(state: State, site: int, over: Array) -> State:
    """Note a context that has grown past what its model can hold."""
    faults = state.faults._replace(overflow=jnp.where(over, site, state.faults.overflow))
    return state._replace(faults=faults)
