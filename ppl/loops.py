"""Loops that hold sites: each becomes a scan of fixed length that carries the particle's state.

`enter` reads an equation, `one_step` walks one step of it, `leave` gives its outputs and `gather` hands what was recorded to
the enclosing frame. `walk_loop` does all of it in one compiled loop; a run in segments takes the steps one by one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from .collectives import index, reindex
from .errors import TransformationError
from .jaxpr import all_eqns, is_site, scan_of, sites_inside
from .lineage import Cell, follow_back
from .staging import loop_bound
from .state import State

if TYPE_CHECKING:
    from .interpreter import Interpreter

Array = jax.Array


class Loop(NamedTuple):
    """A loop of a fixed number of steps."""

    body: Any
    length: int
    reverse: bool
    carry: list[Cell]
    step: Callable[["Interpreter", list[Cell], Array], tuple[list[Cell], list[Cell]]]
    """from the carry at a step, and the index into its inputs and outputs, to the carry after it and its outputs"""
    leave: Callable[["Interpreter", list[Cell], list[Cell]], list[Cell]]
    """from the last carry and the stacked outputs to the outputs of the equation"""


class Looping(NamedTuple):
    """What goes from step to step."""

    carry: list[Array]
    since: Array
    """int32[]: which particle's values at the loop's start this particle has"""
    state: State


class Collected(NamedTuple):
    """What one step leaves behind."""

    outputs: list[Array]
    records: dict[str, tuple[Any, Array]]
    moved: Array
    """int32[]: ancestor map of the step"""


def enter(run: "Interpreter", eqn: Any, inputs: list[Cell]) -> Loop:
    """The loop of a scan or while equation; its inputs are brought to the loop's start."""
    for cell in inputs:
        run.frame.get(cell)
    return _scan(eqn, inputs) if eqn.primitive.name == "scan" else _while(run, eqn, inputs)


def length_of(eqn: Any) -> int:
    """How many steps the loop of an equation has."""
    return int(scan_of(eqn).length if eqn.primitive.name == "scan" else loop_bound(eqn)[0])


def _scan(eqn: Any, inputs: list[Cell]) -> Loop:
    s = scan_of(eqn)
    consts, carry, xs = inputs[: s.num_consts], inputs[s.num_consts :][: s.num_carry], inputs[s.num_consts + s.num_carry :]

    def step(body: "Interpreter", carry: list[Cell], at: Array) -> tuple[list[Cell], list[Cell]]:
        slices = [Cell(jnp.asarray(c.value)[at], 0) for c in xs]
        out = body.walk(s.body, [*[body.enter(c) for c in consts], *carry, *slices])
        return out[: s.num_carry], out[s.num_carry :]

    return Loop(s.body, s.length, s.reverse, carry, step, lambda _, carry, ys: [*carry, *ys])


def _while(run: "Interpreter", eqn: Any, inputs: list[Cell]) -> Loop:
    """As many steps as the bound says, each under the mask "still going"."""
    bound, truncate = loop_bound(eqn)
    p = eqn.params
    if any(is_site(e) for e in all_eqns(p["cond_jaxpr"])):
        raise TransformationError("a while loop's condition holds a site; move it to the body and carry its value")
    n, m = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, init = inputs[:n], inputs[n : n + m], inputs[n + m :]
    going = run.walk(p["cond_jaxpr"], [*cond_consts, *init])[0]

    def step(body: "Interpreter", carry: list[Cell], _: Array) -> tuple[list[Cell], list[Cell]]:
        *values, going = carry
        outer = body.active
        body.active = body.frame.put(jnp.asarray(body.frame.get(outer)) & body.frame.get(going))
        out = body.walk(p["body_jaxpr"], [*[body.enter(c) for c in body_consts], *values])
        now = body.frame.get(going)
        new = [body.frame.put(jnp.where(now, body.frame.get(o), body.frame.get(v))) for o, v in zip(out, values)]
        again = body.walk(p["cond_jaxpr"], [*[body.enter(c) for c in cond_consts], *new])[0]
        return [*new, body.frame.put(now & body.frame.get(again))], []

    def leave(run: "Interpreter", carry: list[Cell], _: list[Cell]) -> list[Cell]:
        *values, going = carry
        if not truncate:
            inside = [e.params["name"] for e in all_eqns(p["body_jaxpr"]) if is_site(e)]
            number = run.staged.sites[next((name for name in inside if name != "bound()"), "bound()")].number
            s, over = run.state, run.frame.get(going) & run.is_active() & (run.state.log_weight > -jnp.inf)
            run.state = s._replace(faults=s.faults._replace(bound=jnp.where(over, number, s.faults.bound)))
        return values

    return Loop(p["body_jaxpr"], bound, False, [*init, going], step, leave)


def start(run: "Interpreter", loop: Loop) -> Looping:
    """What the first step starts from."""
    run.settle()
    me = jnp.int32(0) if run.policy is None else index(run.policy.axes[-1])
    return Looping([jnp.asarray(run.frame.get(c)) for c in loop.carry], me, run.state)


def one_step(run: "Interpreter", loop: Loop, looping: Looping, i: Array) -> tuple[Looping, Collected]:
    """Step `i` of a loop, counted from 0, in a frame of its own."""
    within, resamples = set(sites_inside(loop.body)), run.policy is not None
    me = jnp.int32(0) if run.policy is None else index(run.policy.axes[-1])
    run.state = looping.state
    run.moved = True  # by the step before, or before the loop
    at = loop.length - 1 - i if loop.reverse else i
    with run.inside([looping.since] if resamples else [], (at,)):
        start = len(run.frame.lineage)
        part = lambda c: jax.tree.map(lambda x: x[at], c.value)
        run.given = {k: Cell(part(c), 0) for k, c in run.given.items() if k in within}
        carried, collected = loop.step(run, [run.frame.put(v) for v in looping.carry], at)
        carry = [jnp.asarray(run.frame.get(c)).astype(v.dtype) for c, v in zip(carried, looping.carry)]
        outputs, records = [run.frame.get(c) for c in collected], run.recorded()
        moved = me
        for ancestor in run.frame.lineage[start:]:
            moved = reindex(moved, ancestor)
    since = reindex(looping.since, moved) if resamples else looping.since
    return Looping(carry, since, run.state), Collected(outputs, records, moved)


def gather(run: "Interpreter", loop: Loop, looping: Looping, collected: Collected) -> tuple[list[Cell], list[Cell]]:
    """Carry and outputs after the steps that `collected` holds (stacked), whose records the enclosing frame takes over.
    Values that cross the loop follow its genealogy once, here."""
    run.state, run.moved = looping.state, True
    outputs, records = collected.outputs, collected.records
    if run.policy is not None:
        outputs, records = follow_back((outputs, records), collected.moved, index(run.policy.axes[-1]))
        run.frame.lineage.append(looping.since)
    if loop.reverse:
        outputs, records = jax.tree.map(lambda y: y[::-1], (outputs, records))
    run.merge_records(records)
    return [run.frame.put(v) for v in looping.carry], [run.frame.put(y) for y in outputs]


def leave(run: "Interpreter", loop: Loop, looping: Looping, collected: Collected) -> list[Cell]:
    """The outputs of a loop's equation, when all steps are done."""
    return loop.leave(run, *gather(run, loop, looping, collected))


def walk_loop(run: "Interpreter", eqn: Any, inputs: list[Cell]) -> list[Cell]:
    """The whole loop, as one scan."""
    loop = enter(run, eqn, inputs)
    steps = jnp.arange(loop.length, dtype=jnp.int32)
    looping, collected = jax.lax.scan(lambda looping, i: one_step(run, loop, looping, i), start(run, loop), steps)
    return leave(run, loop, looping, collected)
