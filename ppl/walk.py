"""One walk through a program, kept with all that it takes to walk again from some point on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .again import Repeated, rewound
from .arena import Arena, Prompt
from .choices import Choices
from .interpreter import Interpreter, first_state
from .notes import About, Notes, walked
from .run import Arrays, models_of
from .staging import Staged
from .state import State, Tempering

Array = jax.Array


class Walk(NamedTuple):
    """A trace of one particle, how its choices were made, and the caches of its contexts."""

    values: dict[str, Any]
    """of every site, as the interpreter records them"""
    active: dict[str, Array]
    returned: list[Array]
    notes: dict[str, About]
    """of every random site"""
    log_weight: Array
    """float32[], nats: log of target over what the choices were drawn from, repeated ones included"""
    made: Array
    """int32[]: how many random choices"""
    arenas: tuple[Arena, ...]
    prompts: dict[int, list[Prompt]]

    def inside(self, random: list[str]) -> dict[str, Array]:
        """bool for each choice of the random sites, as in `notes`: whether it is active and, of a text, before its end."""
        found = {}
        for name in random:
            active, log_q = self.active[name], self.notes[name].log_q
            if log_q.ndim > active.ndim:  # a text
                active = active[..., None] & (jnp.arange(log_q.shape[-1]) < self.values[name][1][..., None])
            found[name] = active
        return found


def walk(
    staged: Staged,
    arrays: Arrays,
    given: dict[str, Array],
    drawn: Choices,
    values: dict[str, Array],
    kept: dict[str, Array],
    *,
    before: Walk | None = None,
    notes: Notes,
    tempering: Tempering | None = None,
    axes: tuple[str, ...] = (),
) -> tuple[Walk, State]:
    """One particle's walk, and the state that it ended with; `axes` are those of others that walk side by side with it.

    It repeats those of `values` that are `kept` (see `Repeated`); the others are `drawn`. From `before` it takes over what need
    not be read again; without it all is read.
    """
    consts = dict(zip(staged.consts, arrays.consts))
    models = models_of(staged, arrays)
    choices: Choices = Repeated(drawn, values, kept, *_records(before))
    state = first_state(staged, models, choices, jnp.int32(0))
    if before is not None:
        state = state._replace(same=jnp.asarray(True), arenas=tuple(map(rewound, before.arenas)))
    run = Interpreter(staged, consts, models, state, given=given, axes=axes, tempering=tempering)
    run.notes, run.is_density = notes, False
    if before is not None:
        run.prompts_before = before.prompts
    cells = run.walk(staged.jaxpr, [run.frame.put(x) for x in arrays.inputs])
    s, prompts = run.state, {m: run.read_prompts(m) for m in run.prompts}
    found = walked(run, cells)
    return Walk(found.values, found.active, found.returned, found.notes, s.log_weight, s.made, s.arenas, prompts), s


def _records(before: Walk | None) -> tuple[dict[str, Any], dict[str, About]]:
    return ({}, {}) if before is None else (before.values, before.notes)
