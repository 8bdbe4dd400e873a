"""Resampling, and how values follow their particle through it."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from .choices import Choices
from .collectives import gather, index, move, reindex
from .state import Resamplings, State, total_twist

Array = jax.Array


class Policy(Protocol):
    """When and how a population resamples. Called by every particle before a draw, where weights have moved."""

    @property
    def inside_texts(self) -> bool:
        """Whether to resample between the tokens of a text too."""
        ...

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that it runs under, outermost first; the last is that of the population which resamples."""
        ...

    def __call__(self, choices: Choices, clock: Array, chance: Array, log_weight: Array) -> tuple[Array, Array, Array, Choices]:
        """Given how often the population could resample before (`chance`, int32[], shared) and this particle's log-weight,
        twists included: whether to resample (bool[], shared), this particle's ancestor (int32[], itself where not), its new
        log-weight, and the choices."""
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


def follow_back(rows: Any, maps: Array, me: Array) -> Any:
    """Row t of a loop's outputs, moved by every ancestor map applied after step t."""

    def back(later: Array, row: Any) -> tuple[Array, Any]:
        values, ancestor = row
        return reindex(ancestor, later), reindex(values, later)

    return jax.lax.scan(back, me, (rows, maps), reverse=True)[1]


def normalised(log_weight: Array, axis: str) -> tuple[Array, Array]:
    """Everybody's weight float32[N] and the log of their sum; the weights sum to 1, even ones where all are 0."""
    log_weights = gather(log_weight, axis)
    total = jax.nn.logsumexp(log_weights)
    alive = total > -jnp.inf
    return jnp.where(alive, jnp.exp(log_weights - jnp.where(alive, total, 0.0)), 1 / log_weights.shape[0]), total


def resample(policy: Policy, state: State, extra: Any) -> tuple[State, Any, Array]:
    """Let the population resample. Caches and `extra` move only when it does; returns this particle's ancestor."""
    twist = total_twist(state)
    due, ancestor, total, choices = policy(state.choices, state.clock, state.chances, state.log_weight + twist)
    fresh = state.clock != state.asked  # else weights have not moved since, and the same numbers would be drawn again
    due, ancestor = due & fresh, jnp.where(fresh, ancestor, index(policy.axes[-1]))
    arenas, extra = move(due, (state.arenas, extra), ancestor)
    log_twists = reindex(state.log_twists, ancestor)
    root, made = reindex((state.root, state.made), ancestor)
    resamplings = noted(state.resamplings, due, ancestor, state.clock)
    moved = state._replace(choices=choices, arenas=arenas, log_twists=log_twists, root=root, made=made,
                           asked=state.clock, chances=state.chances + fresh, resamplings=resamplings)  # fmt: skip
    log_weight = jnp.where(due, total - total_twist(moved), state.log_weight)
    own = reindex(state.log_weight - state.offset, ancestor)
    return moved._replace(log_weight=log_weight, offset=jnp.where(due, log_weight - own, state.offset)), extra, ancestor


def remembering(state: State, generations: int) -> State:
    """A first state that keeps the latest `generations` resamplings; none where that is 0."""
    if generations == 0:
        return state
    nobody_moved = jnp.broadcast_to(index(), generations)
    return state._replace(resamplings=Resamplings(nobody_moved, jnp.zeros(generations, jnp.int32), jnp.int32(0), index()))


def noted(kept: Resamplings | None, due: Array, ancestor: Array, clock: Array) -> Resamplings | None:
    """The resamplings with one more, where it was due. One slot is written: what is kept costs the same however much it is."""
    if kept is None:
        return None
    capacity = kept.ancestors.shape[0]
    slot = kept.total % capacity
    oldest = kept.ancestors[slot]  # gives its slot to the new one, once all are taken
    before = jnp.where(due & (kept.total >= capacity), reindex(kept.before, oldest), kept.before)
    write = lambda old, new: old.at[slot].set(jnp.where(due, new, old[slot]))
    return Resamplings(write(kept.ancestors, ancestor), write(kept.clocks, clock), kept.total + due, before)
