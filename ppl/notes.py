"""How choices were made: what a walk records besides its trace, for moves that keep a part of it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from .choices import Choices, SiteRef

if TYPE_CHECKING:
    from .interpreter import Interpreter

Array = jax.Array


Visit = Callable[[SiteRef, Any, Array, Choices, Array], tuple[Array, Any]]
"""Of a visit of a site, the distribution, the value, the choices before it and which one it is: the log density float32[],
nats, and more to record."""


class Notes(NamedTuple):
    """What to record; static."""

    entropies: bool = False
    """of the model's next token, which costs a pass over the vocabulary"""
    visit: "Visit | None" = None
    """says how a value was drawn in place of its log density alone"""


class About(NamedTuple):
    """How the choices of a site were made: float and int arrays [] of a value, [max_tokens] of a text, 0 past its end."""

    log_q: Array
    """float32, nats: log probability or density under what it was drawn from"""
    number: Array
    """int32: which of the trace's active choices it is"""
    entropy: Array | None
    """float32, nats: of the model's next token; 0 for a value"""
    more: Any = None
    """what `Notes.visit` says of a value besides"""


def about(name: str) -> str:
    """Under what name a site's notes are recorded; no site is called so."""
    return f"about({name})"


def note_value(run: "Interpreter", name: str, dist: Any, value: Array, log_prob: Callable[[Any, Array], Array]) -> None:
    """Record how a value was drawn; the choice is still to be counted."""
    if run.notes is None:
        return
    number, more = run.state.made, None
    if run.notes.visit is None:
        log_q = log_prob(dist, value)
    else:
        log_q, more = run.notes.visit(run.site(name), dist, value, run.state.choices, number)
    entropy = jnp.float32(0) if run.notes.entropies else None
    run.record(about(name), About(log_q.astype(jnp.float32), number, entropy, more))


def note_text(run: "Interpreter", name: str, log_q: Array, entropy: Array | None, number: Array) -> None:
    """Record how a text was drawn, whose first token is choice `number`. In a plate, which is one choice, all have its."""
    if run.notes is not None:
        numbers = number + (0 if run.in_plate else jnp.arange(log_q.shape[0], dtype=jnp.int32))
        run.record(about(name), About(log_q, jnp.broadcast_to(numbers, log_q.shape), entropy))


def entropy_of(logits: Array) -> Array:
    """float32[], nats, of softmax(logits)."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0).sum()


class Walked(NamedTuple):
    """What a walk recorded."""

    values: dict[str, Any]
    """of every site, as the interpreter records them"""
    active: dict[str, Array]
    returned: list[Array]
    notes: dict[str, About]
    """of every random site"""


def walked(run: "Interpreter", cells: list[Any]) -> Walked:
    """What an interpreter that has notes recorded; `cells` are those of what the program returns."""
    records = {name: run.frame.get(value) for name, (value, _) in run.records.items()}
    values = {name: value for name, value in records.items() if not isinstance(value, About)}
    notes = {name: records[about(name)] for name in values if about(name) in records}
    active = {name: run.frame.get(run.records[name][1]) for name in values}
    return Walked(values, active, [jnp.asarray(run.frame.get(cell)) for cell in cells], notes)
