"""The interpreter's store of cached tokens, and the table from context handles to the tokens of each context.

A context is a row of the table. Its most recent token is *pending*: not cached yet, it is fed to the model together with
whatever comes next, so nobody has to carry logits. Tokens before it lie in one prompt block, shared by all particles, and
in slots of this particle's own cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .collectives import spread
from .language_model import Block, LanguageModel, Memory, empty_memory

Array = jax.Array


class Prompt(NamedTuple):
    """A prefilled prompt: all of its tokens but the last, which is the context's pending one."""

    entries: Any
    tokens: Array
    """int32[B]"""
    cached: Array
    """int32[]: how many of the B slots hold tokens"""


class Row(NamedTuple):
    """One context. In the table every field has a leading axis of handles."""

    slots: tuple[Array, ...]
    """bool[S] for each level of the arena: which slots belong to the context"""
    prompt: Array
    """int32[]: number of the prompt block that it starts with, -1 for none"""
    position: Array
    """int32[]: number of cached tokens, which is the position of the pending one"""
    pending: Array
    """int32[]"""
    last: Array
    """int32[]: slot of the most recent cached token, counted over all levels; -1 where it lies in the prompt"""
    finished: Array
    """bool[]: whether a generated or scored EOS ended it"""
    features: Array
    """float32[D]: the model's features at the pending token, where somebody has asked; D is 0 where no program asks"""
    ahead: Array
    """int32[]: slot of the pending token, counted over all levels, where somebody has asked for its features; else -1, or -2
    where they are known from the walk before, and nobody has asked again"""
    parent: Array
    """int32[]: handle of the context that it goes on from; -1 for a prompt"""
    begins: Array
    """int32[]: first free slot before it was made"""


class Arena(NamedTuple):
    """Cache of one model. Levels before the last belong to enclosing plates' parents and are only read."""

    caches: tuple[Any, ...]
    """for each level, entries with S slots"""
    tokens: tuple[Array, ...]
    """int32[S] for each level: the token in each slot"""
    table: Row
    used: Array
    """int32[]: first free slot of the last level"""
    handles: Array
    """int32[]: first free row, the same for all particles"""


def new_arena(lm: LanguageModel, handles: int, slots: int, features: int) -> Arena:
    """An empty arena with room for `handles` contexts, `slots` cached tokens and so many features of each context."""
    cache, tokens = _empty_level(lm, slots)
    scalar = jnp.zeros(handles, jnp.int32)
    read = jnp.zeros((handles, features), jnp.float32)
    slots_of, finished = jnp.zeros((handles, slots), bool), jnp.zeros(handles, bool)
    table = Row((slots_of,), scalar - 1, scalar, scalar, scalar - 1, finished, read, scalar - 1, scalar - 1, scalar)
    return Arena((cache,), (tokens,), table, jnp.int32(0), jnp.int32(0))


def with_level(arena: Arena, lm: LanguageModel, handles: int, slots: int) -> Arena:
    """The arena of a plate's element: sees all of `arena`, writes to a level of its own."""
    cache, tokens = _empty_level(lm, slots)
    table = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros((handles, *x.shape[1:]), x.dtype)]), arena.table)
    own = jnp.zeros((table.prompt.shape[0], slots), bool)
    return Arena((*arena.caches, cache), (*arena.tokens, tokens), table._replace(slots=(*table.slots, own)),
                 jnp.int32(0), arena.handles)  # fmt: skip


def _empty_level(lm: LanguageModel, slots: int) -> tuple[Any, Array]:
    tokens = jnp.zeros(slots, jnp.int32)
    entries = jax.eval_shape(lambda t: lm.forward(t, empty_memory())[1], jnp.zeros(1, jnp.int32))
    widen = lambda e: jnp.zeros((*e.shape[:-2], slots, e.shape[-1]), e.dtype)
    return jax.tree.map(widen, entries), tokens


def read_row(arena: Arena, handle: Array) -> Row:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, handle, keepdims=False), arena.table)


def add_row(arena: Arena, row: Row) -> tuple[Arena, Array]:
    """Write a new context; returns its handle. All particles write, taken branch or not, so that handles stay shared."""
    return set_row(arena, arena.handles, row)._replace(handles=arena.handles + 1), arena.handles


def set_row(arena: Arena, handle: Array, row: Row) -> Arena:
    put = lambda x, r: jax.lax.dynamic_update_index_in_dim(x, r.astype(x.dtype), handle, 0)
    return arena._replace(table=jax.tree.map(put, arena.table, row))


def memory(arena: Arena, row: Row, prompts: list[Prompt]) -> Memory:
    """What the model sees before a context's pending token."""
    blocks = [Block(p.entries, (row.prompt == b) & (jnp.arange(p.tokens.shape[0]) < p.cached)) for b, p in enumerate(prompts)]
    blocks += [Block(cache, mask) for cache, mask in zip(arena.caches, row.slots) if mask.shape[0]]
    return Memory(tuple(blocks), row.position, _last_entries(arena, row, prompts))


def _last_entries(arena: Arena, row: Row, prompts: list[Prompt]) -> Any:
    """The entries of the most recent cached token. Models that do not read them cost nothing: the compiler drops this."""

    def at(entries: Any, slot: Array) -> Any:
        clipped = jnp.maximum(slot, 0)
        return jax.tree.map(lambda e: jax.lax.dynamic_slice_in_dim(e, clipped, 1, axis=-2), entries)

    candidates = [(row.last < 0, row.prompt == b, at(p.entries, p.cached - 1)) for b, p in enumerate(prompts)]
    offset = 0
    for cache, mask in zip(arena.caches, row.slots):
        size = mask.shape[0]
        if size:
            inside = (row.last >= offset) & (row.last < offset + size)
            candidates.append((row.last >= 0, inside, at(cache, jnp.clip(row.last - offset, 0, size - 1))))
        offset += size
    if not candidates:
        return None
    chosen = jax.tree.map(jnp.zeros_like, candidates[0][2])
    for first, second, entries in candidates:
        chosen = jax.tree.map(lambda c, e, here=first & second: jnp.where(here, e, c), chosen, entries)
    return chosen


def write_entries(arena: Arena, entries: Any, tokens: Array, only: Array | None = None) -> Arena:
    """Put T new tokens into the slots from `used` on. What is not claimed afterwards (`claim`) will be overwritten. `only`
    says which of them to put there (bool[T]); other slots keep what they have, for a walk that comes back to it."""
    if only is not None:
        there = jax.lax.dynamic_slice_in_dim(arena.tokens[-1], arena.used, tokens.shape[0])
        keep = lambda new, old: jnp.where(only[:, None], new.astype(old.dtype), old)
        entries, tokens = jax.tree.map(keep, entries, entries_here(arena, entries)), jnp.where(only, tokens, there)
    put = lambda cache, e: jax.lax.dynamic_update_slice_in_dim(cache, e.astype(cache.dtype), arena.used, axis=-2)
    cache = spread(jax.tree.map(put, arena.caches[-1], entries))
    written = jax.lax.dynamic_update_slice_in_dim(arena.tokens[-1], tokens, arena.used, axis=0)
    return arena._replace(caches=(*arena.caches[:-1], cache), tokens=(*arena.tokens[:-1], written))


def entries_here(arena: Arena, like: Any) -> Any:
    """What lies in the first free slots already, as many as `like` has."""
    at = lambda cache, e: jax.lax.dynamic_slice_in_dim(cache, arena.used, e.shape[-2], axis=-2)
    return jax.tree.map(at, arena.caches[-1], like)


def written_after(arena: Arena, features: Array) -> Arena:
    """The same arena, in whose first free slot the compiler sees a result of this pass.

    The write then comes after every read of the cache, and happens in place; without that order the compiler copies the
    whole cache twice per token.
    """
    computed = jnp.isnan(features.ravel()[0]).astype(jnp.int32)
    return arena._replace(used=jnp.minimum(arena.used, arena.used + computed))


def claim(arena: Arena, row: Row, count: Array, pending: Array) -> tuple[Arena, Row]:
    """Give the next `count` slots to a context, whose last token becomes `pending`; nothing happens where count is 0."""
    slot = jnp.arange(row.slots[-1].shape[0])
    own = row.slots[-1] | ((slot >= arena.used) & (slot < arena.used + count))
    some = count > 0
    row = row._replace(
        slots=(*row.slots[:-1], own),
        position=row.position + count,
        pending=jnp.where(some, pending, row.pending),
        last=jnp.where(some, first_own(row) + arena.used + count - 1, row.last),
        ahead=jnp.where(some, -1, row.ahead),
    )
    return arena._replace(used=arena.used + count), row


def first_own(row: Row) -> int:
    """The number of the last level's first slot, counted over all levels."""
    return sum(s.shape[0] for s in row.slots[:-1])


def append(
    lm: LanguageModel, arena: Arena, row: Row, prompts: list[Prompt], tokens: Array, count: Array
) -> tuple[Array, Arena, Row]:
    """Feed the first `count` of `tokens` (int32[T]) to a context.

    Returns features [T, D], whose row t predicts tokens[t], and the arena and row with those tokens. A draft of several
    tokens, of which only the first `count` turn out to be accepted, leaves no trace of the others.
    """
    fed = jnp.concatenate([row.pending[None], tokens[:-1]])
    features, entries = lm.forward(fed, memory(arena, row, prompts))
    arena = written_after(arena, features)
    arena = write_entries(arena, entries, fed)
    pending = jax.lax.dynamic_index_in_dim(tokens, jnp.maximum(count - 1, 0), keepdims=False)
    arena, row = claim(arena, row, count, pending)
    return features, arena, row


def read_pending(
    lm: LanguageModel,
    arena: Arena,
    row: Row,
    prompts: list[Prompt],
    needed: Callable[[Array], Array],
    only: Array | None = None,
) -> tuple[Array, Arena, Array]:
    """Feed a context's pending token to the model, unless its features are known already.

    Returns features [1, D], the arena with the token's entries in the first free slot, which is not claimed, and whether
    there was a pass. There is one if this particle or another one, `needed(bool[])` says, has not had it. Where `only` is
    false (bool[]) the slot keeps what it has.
    """
    fed = row.pending[None]
    forward = lambda: lm.forward(fed, memory(arena, row, prompts))
    if not row.features.shape[-1]:
        features, entries = forward()
        passed = jnp.asarray(True)
    else:
        like = jax.eval_shape(forward)
        passed = needed(row.ahead == -1)
        known = lambda: (row.features[None].astype(like[0].dtype), entries_here(arena, like[1]))
        features, entries = jax.lax.cond(passed, forward, known)
    arena = written_after(arena, features)
    return features, write_entries(arena, entries, fed, None if only is None else only[None]), passed


def take(arena: Arena, row: Row, live: Array) -> tuple[Arena, Row]:
    """Give a context's pending token, which `read_pending` has fed, its slot; nothing happens where not `live`.

    What is written next goes to the slot after it, be it of this context or of another one of the same arena. The token stays
    the pending one until the caller says which comes next.
    """
    known = live & (row.ahead >= 0)
    arena, after = claim(arena, row, (live & ~known).astype(jnp.int32), row.pending)
    if not row.features.shape[-1]:
        return arena, after
    start, slots = 0, []
    for mask in row.slots:
        slots.append(mask | (jnp.arange(mask.shape[0]) + start == row.ahead))
        start += mask.shape[0]
    cached = row._replace(slots=tuple(slots), position=row.position + 1, last=row.ahead, ahead=jnp.full_like(row.ahead, -1))
    return arena, jax.tree.map(lambda a, b: jnp.where(known, a, b), cached, after)


def keep_features(arena: Arena, handle: Array, row: Row, features: Array, wanted: Array) -> Arena:
    """Note in the table what `read_pending` found; the token's slot is taken."""
    new = wanted & (row.ahead < 0)
    row = row._replace(
        features=jnp.where(new, features[0].astype(jnp.float32), row.features),
        ahead=jnp.where(new, first_own(row) + arena.used, row.ahead),
    )
    return set_row(arena._replace(used=arena.used + new), handle, row)


def start_row(lm: LanguageModel, arena: Arena) -> Row:
    """The context that holds the start token only."""
    empty = tuple(jnp.zeros(s.shape[1], bool) for s in arena.table.slots)
    nothing = jnp.zeros(arena.table.features.shape[-1:], jnp.float32)
    none = jnp.int32(-1)
    return Row(empty, none, jnp.int32(0), jnp.int32(lm.start_id), none, jnp.asarray(False), nothing, none, none, jnp.int32(0))


def prefill(lm: LanguageModel, tokens: Array, count: Array) -> Prompt:
    """Cache all but the last of a prompt's `count` tokens (int32[B])."""
    _, entries = lm.forward(tokens, empty_memory())
    return Prompt(entries, tokens, jnp.maximum(count - 1, 0))


def last_tokens(arena: Arena, row: Row, prompts: list[Prompt], last: int, pad: int) -> tuple[Array, Array]:
    """The last tokens of a context, oldest first (int32[last], padded at the front), and how many are real."""
    prompted = [(row.prompt == b) & (jnp.arange(p.tokens.shape[0]) < p.cached) for b, p in enumerate(prompts)]
    # slots are handed out in order of time, so a context's tokens lie in order
    tokens = jnp.concatenate([*(p.tokens for p in prompts), *arena.tokens, row.pending[None]])
    mask = jnp.concatenate([*prompted, *row.slots, jnp.asarray([True])])
    from_end = jnp.cumsum(mask[::-1])[::-1]  # the last token has 1
    place = jnp.where(mask & (from_end <= last), last - from_end, last)
    found = jnp.full(last, pad, jnp.int32).at[place].set(tokens, mode="drop")
    return found, jnp.minimum(mask.sum(), last).astype(jnp.int32)
