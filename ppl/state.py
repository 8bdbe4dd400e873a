"""What a particle carries from site to site, and how values follow it through resamplings."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from .arena import Arena
from .choices import Choices
from .collectives import reindex

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
    root: Array
    """int32[]: this particle's ancestor at the start of the run"""


def no_faults() -> Faults:
    none = jnp.int32(-1)
    return Faults(none, none, none, none, none, jnp.asarray(False))


def no_counts() -> Counts:
    zero = jnp.int32(0)
    return Counts(zero, zero, zero, zero)


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
    return state._replace(log_weight=after, faults=faults)


def steer(state: State, name: str, site: int, log_psi: Array, active: Any) -> State:
    """Set a twist where this particle is active."""
    wrong, alive = jnp.isnan(log_psi) | (log_psi == jnp.inf), state.log_weight > -jnp.inf
    twist = jnp.where(active, jnp.where(wrong, -jnp.inf, log_psi), state.log_twists[name]).astype(jnp.float32)
    faults = state.faults._replace(non_finite=jnp.where(active & wrong & alive, site, state.faults.non_finite))
    return state._replace(log_twists={**state.log_twists, name: twist}, faults=faults)


class Policy(Protocol):
    """When and how a population resamples. Called by every particle after its weight has moved."""

    inside_texts: bool
    """whether to resample between the tokens of a text too"""

    def __call__(self, choices: Choices, clock: Array, log_weight: Array) -> tuple[Array, Array, Array, Choices]:
        """Given this particle's log-weight, twists included: whether to resample (bool[], shared), this particle's
        ancestor (int32[], itself where not), its new log-weight, and the choices."""
        ...


class Cell:
    """A value and when it was written, in resamplings of its frame."""

    __slots__ = ("time", "value")

    def __init__(self, value: Any, time: int):
        self.value, self.time = value, time


class Frame:
    """One loop body's view of the genealogy: `lineage` lists the ancestor maps applied since it began.

    A value is moved when it is read, by the maps applied since it was written: what nobody reads never moves.
    """

    def __init__(self, lineage: Sequence[Array] = ()):
        self.lineage = list(lineage)

    def put(self, value: Any) -> Cell:
        return Cell(value, len(self.lineage))

    def get(self, cell: Cell) -> Any:
        for ancestor in self.lineage[cell.time :]:
            cell.value = reindex(cell.value, ancestor)
        cell.time = len(self.lineage)
        return cell.value
