"""Resampling, and how values follow their particle through it."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from .choices import Choices
from .collectives import index, reindex
from .state import State, total_twist

Array = jax.Array


class Policy(Protocol):
    """When and how a population resamples. Called by every particle before a draw, where weights have moved."""

    inside_texts: bool
    """whether to resample between the tokens of a text too"""

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


def resample(policy: Policy, state: State, extra: Any) -> tuple[State, Any, Array]:
    """Let the population resample. Caches and `extra` move only when it does; returns this particle's ancestor."""
    twist = total_twist(state)
    due, ancestor, total, choices = policy(state.choices, state.clock, state.chances, state.log_weight + twist)
    fresh = state.clock != state.asked  # else weights have not moved since, and the same numbers would be drawn again
    due, ancestor = due & fresh, jnp.where(fresh, ancestor, index())
    move = lambda moved: reindex(moved, ancestor)
    arenas, extra = jax.lax.cond(due, move, lambda moved: moved, (state.arenas, extra))
    log_twists = reindex(state.log_twists, ancestor)
    root = reindex(state.root, ancestor)
    moved = state._replace(choices=choices, arenas=arenas, log_twists=log_twists, root=root, asked=state.clock,
                           chances=state.chances + fresh)  # fmt: skip
    log_weight = jnp.where(due, total - total_twist(moved), state.log_weight)
    return moved._replace(log_weight=log_weight), extra, ancestor
