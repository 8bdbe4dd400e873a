"""Walking through a program again: some choices of the walk before are repeated, and no token that was read is read again.

Slots are given out in the order of the walk. As long as contexts read what they read before, each gets the slots that it had,
and the caches of the walk before hold their entries: `State.same` says so. Then a pass through the model can be left out.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from .arena import (
    Arena,
    Prompt,
    Row,
    add_row,
    append,
    claim,
    entries_here,
    memory,
    prefill,
    read_row,
    take,
    write_entries,
    written_after,
)
from .choices import Choices, Repeating, SiteRef, visited
from .collectives import anybody
from .language_model import token_log_probs
from .notes import About
from .staging import steady_prompts
from .state import State, with_arena

if TYPE_CHECKING:
    from .interpreter import Interpreter

Array = jax.Array


class _Repeated(NamedTuple):
    drawn: Choices
    values: dict[str, Array]
    """for each random site what may be repeated, token ids for a text; leading axes for loops and plates"""
    kept: dict[str, Array]
    """bool: which of them are, with an axis of tokens last for a text"""
    records: dict[str, Any]
    """of the walk before"""
    notes: dict[str, About]
    """of the walk before"""


class Repeated(Repeating, _Repeated):
    """The choices of a walk that repeats some of those of the walk before, and draws the others."""

    __slots__ = ()

    def _kept(self, site: SiteRef, drawn: Array, number: Array, step: Array | None = None) -> Array:
        if site.name not in self.values:  # in a rollout, which is no part of the trace
            return drawn
        value, kept = visited((self.values[site.name], self.kept[site.name]), site)
        if step is not None:
            value, kept = value[step], kept[step]
        return jnp.where(kept, value.astype(drawn.dtype), drawn)

    def record_before(self, site: SiteRef) -> Any:
        """What the walk before recorded at a visit of a site."""
        return visited(self.records[site.name], site)

    def text_before(self, site: SiteRef) -> tuple[Any, About, Array]:
        """The record and the notes of a text in the walk before, and how many of its first tokens are repeated."""
        record, note = visited((self.records[site.name], self.notes[site.name]), site)
        value, kept = visited((self.values[site.name], self.kept[site.name]), site)
        inside = jnp.arange(value.shape[0]) < record[1]
        return record, note, jnp.cumprod((kept & inside & (value == record[0])).astype(jnp.int32)).sum()


def rewound(arena: Arena) -> Arena:
    """The arena before the first context, its caches and the table of the walk before being there."""
    return arena._replace(used=jnp.zeros_like(arena.used), handles=jnp.zeros_like(arena.handles))


def new_context(
    run: "Interpreter", model: int, arena: Arena, row: Row, parent: Array, begins: Array, same: Any = None
) -> Array:
    """Write a context that goes on from `parent`; `same` says whether it is that of the walk before."""
    row = row._replace(parent=jnp.asarray(parent, jnp.int32), begins=begins)
    state = run.state
    if state.same is not None:
        before = read_row(arena, arena.handles)
        known = same & (before.ahead != -1)
        row = row._replace(features=jnp.where(known, before.features, row.features), ahead=jnp.where(known, -2, row.ahead))
        state = state._replace(same=same)
    arena, handle = add_row(arena, row)
    run.state = with_arena(state, model, arena)
    return handle


def is_same(state: State, arena: Arena, row: Row, parent: Array, begins: Array) -> Array:
    """bool[]: whether the context `row`, which is about to be written, was so in the walk before, but for its tokens."""
    before = read_row(arena, arena.handles)
    there = (before.prompt == row.prompt) & (before.position == row.position) & (before.pending == row.pending)
    return begins_same(state, before, parent, begins) & there


def begins_same(state: State, before: Row, parent: Array, begins: Array) -> Array:
    """bool[]: whether what goes on from `parent` in the slots from `begins` on did so in the walk before, which made `before`
    of it."""
    return cast(Array, state.same) & (before.parent == parent) & (before.begins == begins)


def read_prompt(run: "Interpreter", model: int, tokens: Array, count: Array) -> tuple[Prompt, Array]:
    """The block of a prompt of `count` tokens int32[B], and whether it is that of the walk before."""
    lm, known = run.models[model], run.prompts_before.get(model, [])[len(run.prompts[model]) :]
    if run.state.same is None or not known:
        run.count(model_calls=1)
        return prefill(lm, tokens, count), jnp.asarray(False)
    before = known[0]
    if steady_prompts(run.staged.jaxpr)[model][len(run.prompts[model])]:
        return before, jnp.asarray(True)
    same = (before.tokens == tokens).all() & (before.cached == jnp.maximum(count - 1, 0))
    passes = anybody(~same, run.axes)
    run.count(model_calls=passes)
    return jax.lax.cond(passes, lambda: prefill(lm, tokens, count), lambda: before), same


def read_given(
    run: "Interpreter", model: int, row: Row, parent: Array, tokens: Array, count: Array, log_probs: Array | None
) -> tuple[Any, Any, Arena, Row, Any]:
    """Append the first `count` of given tokens int32[T] to a context.

    Returns features [T, D] (None where there was a walk before), the tokens' log probabilities float32[T], the arena, the
    context and whether it is that of the walk before; then `log_probs` are those of there. Without `log_probs` nobody asks
    for them.
    """
    lm, arena, prompts = run.models[model], run.state.arenas[model], run.read_prompts(model)
    scored = log_probs is not None
    if run.state.same is None:
        features, arena, row = append(lm, arena, row, prompts, tokens, count)
        run.count(model_calls=1)
        return features, token_log_probs(lm, features, tokens) if scored else None, arena, row, None
    fed = jnp.concatenate([row.pending[None], tokens[:-1]])
    pending = jax.lax.dynamic_index_in_dim(tokens, jnp.maximum(count - 1, 0), keepdims=False)
    claimed, after = claim(arena, row, count, pending)
    there = jax.lax.dynamic_slice_in_dim(arena.tokens[-1], arena.used, fed.shape[0])
    inside = jnp.arange(fed.shape[0]) < count
    same = is_same(run.state, arena, after, parent, arena.used) & ((there == fed) | ~inside).all()

    def read() -> tuple[Array, Array, Any]:
        features, entries = lm.forward(fed, memory(arena, row, prompts))
        return features.ravel()[:1], token_log_probs(lm, features, tokens) if scored else jnp.float32(0), entries

    like = jax.eval_shape(read)
    recall = lambda: (jnp.zeros(1, like[0].dtype), log_probs if scored else jnp.float32(0), entries_here(arena, like[2]))
    passes = anybody((count > 0) & ~same, run.axes)
    seen, found, entries = jax.lax.cond(passes, read, recall)
    run.count(model_calls=passes)
    arena = write_entries(written_after(arena, seen), entries, fed, only=inside)
    return None, found if scored else None, arena._replace(used=claimed.used), after, same


def recall(run: "Interpreter", model: int, site: SiteRef, row: Row, parent: Array, idle: Array) -> tuple[Array, Any, About]:
    """How many tokens of a text are repeated whose entries the caches hold; its record and notes in the walk before."""
    record, note, kept = run.state.choices.text_before(site)  # type: ignore[attr-defined]
    arena = run.state.arenas[model]
    before = read_row(arena, arena.handles)
    same = begins_same(run.state, before, parent, arena.used) & ~idle
    return jnp.where(same, jnp.minimum(kept, before.position - row.position), 0), record, note


def taken_again(arena: Arena, row: Row, tokens: Array, count: Array, eos_id: int) -> tuple[Arena, Row]:
    """The arena and the context after the first `count` of tokens int32[T], whose entries lie in the slots to come."""
    arena, row = take(arena, row, count > 0)
    last = tokens[jnp.maximum(count - 1, 0)]
    arena, row = claim(arena, row, jnp.maximum(count - 1, 0), last)
    some = count > 0
    return arena, row._replace(
        pending=jnp.where(some, last, row.pending), finished=jnp.where(some, last == eos_id, row.finished)
    )


def run_automata(step: Callable[[Any, Array], Any], states: Any, tokens: Array, count: Array, axes: tuple[str, ...]) -> Any:
    """States after the first `count` of tokens int32[T]: `step` gives those after one."""
    if not jax.tree.leaves(states):
        return states
    going = lambda loop: anybody(loop[0] < count, axes)

    def one(loop: Any) -> Any:
        t, states = loop
        after = step(states, tokens[jnp.minimum(t, tokens.shape[0] - 1)])
        return t + 1, jax.tree.map(lambda new, old: jnp.where(t < count, new, old), after, states)

    return jax.lax.while_loop(going, one, (jnp.int32(0), states))[1]
