"""Runs in segments: the same run as one compiled call, cut where a host may stop it, save it, and go on.

A program is cut after each text at its top level, and into the steps of its top-level loops. What crosses a cut is a
`Boundary`; what particles share, such as a prompt's cache, stays shared.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import loops
from .arena import Prompt
from .boundary import Boundary, over, parted
from .collectives import anybody, index
from .interpreter import Interpreter, first_state
from .jaxpr import DropVar, Literal, body_of, inner_jaxprs, is_site, sites_inside
from .lineage import remembering
from .loops import Collected, Looping
from .run import Arrays, Output, Settings, arrays_of, compiled, given_arrays, models_of
from .sites import generate_p
from .staging import Staged, walks_into
from .state import Counts, Faults, State, total_twist

Array = jax.Array


class Segment(NamedTuple):
    """Top-level equations `start` to `stop`, left out; a loop is one by itself."""

    start: int
    stop: int
    is_loop: bool


def segments(staged: Staged) -> tuple[Segment, ...]:
    """Where a program is cut."""
    found, start = [], 0
    eqns = body_of(staged.jaxpr).eqns
    for i, eqn in enumerate(eqns):
        is_loop = eqn.primitive.name in ("scan", "while") and walks_into(eqn)
        if is_loop:
            if start < i:
                found.append(Segment(start, i, False))
            found.append(Segment(i, i + 1, True))
            start = i + 1
        elif eqn.primitive is generate_p:
            found.append(Segment(start, i + 1, False))
            start = i + 1
    if start < len(eqns) or not found:
        found.append(Segment(start, len(eqns), False))
    return tuple(found)


class Carried(NamedTuple):
    """What one particle carries over a cut."""

    env: list[Any]
    """values of `live` variables"""
    records: dict[str, tuple[Any, Any]]
    prompts: dict[int, list[Prompt]]
    state: State
    loop: Any = None
    """in a loop, whose start `env` is from: carry and `since` of `Looping`; None elsewhere"""

    def looping(self) -> Looping:
        """What goes from step to step of the loop."""
        carry, since = self.loop
        return Looping(carry, since, self.state)


def live(jaxpr: Any, at: int) -> list[Any]:
    """The variables that equations before number `at` define, or that are inputs, and that are read from there on."""
    defined = [*jaxpr.invars, *(v for eqn in jaxpr.eqns[:at] for v in eqn.outvars if not isinstance(v, DropVar))]
    reads = [a for eqn in jaxpr.eqns[at:] for a in eqn.invars] + list(jaxpr.outvars)
    read = {a for a in reads if not isinstance(a, Literal)}
    return [v for v in defined if v in read]


class Setting(NamedTuple):
    """What every part of a segmented run is compiled from."""

    staged: Staged
    """a skeleton"""
    settings: Settings
    arrays: Arrays
    given: dict[str, Array]
    drawn: frozenset[str] = frozenset()
    """see `Interpreter.drawn`"""

    def interpreter(self, carried: Carried, at: int) -> tuple[Interpreter, dict[Any, Any]]:
        """An interpreter that goes on from a cut before equation `at`, and its variables."""
        consts = dict(zip(self.staged.consts, self.arrays.consts))
        models = models_of(self.staged, self.arrays)
        callback = self.settings.progress
        progress = None if callback is None else lambda x: jax.debug.callback(callback, x)
        run = Interpreter(
            self.staged,
            consts,
            models,
            carried.state,
            given=self.given,
            policy=self.settings.policy,
            progress=progress,
            axes=self.settings.axes,
        )
        put = run.frame.put
        run.records = {name: (put(value), put(active)) for name, (value, active) in carried.records.items()}
        run.prompts = {m: [put(p) for p in blocks] for m, blocks in carried.prompts.items()}
        run.moved, run.drawn = True, self.drawn
        run.steered |= self.settings.steered
        run.is_density = False  # particles take different branches
        env = run.constants(self.staged.jaxpr)
        env.update(zip(live(body_of(self.staged.jaxpr), at), map(put, carried.env)))
        return run, env

    def loop(self, carried: Carried, at: int) -> tuple[Interpreter, dict[Any, Any], loops.Loop]:
        """The same, and the loop that equation `at` is."""
        run, env = self.interpreter(carried, at)
        eqn = body_of(self.staged.jaxpr).eqns[at]
        loop = loops.enter(run, eqn, [run.read(env, a) for a in eqn.invars])
        run.settle()
        return run, env, loop

    def pause(self, run: Interpreter, env: dict[Any, Any], at: int, loop: Any = None) -> Carried:
        """What crosses a cut before equation `at`."""
        values = [run.frame.get(env[v]) for v in live(body_of(self.staged.jaxpr), at)]
        prompts = {m: run.read_prompts(m) for m in run.prompts}
        return Carried(values, run.recorded(), prompts, run.state, loop)

    def over(self, boundary: Boundary, fn: Callable[..., Any], *more: Any) -> Boundary:
        """`fn` of what each particle carries, and of `more`: other boundaries, or arrays with a leading axis of particles."""
        return over(boundary, fn, *more, size=self.settings.num_particles)

    def parted(self, both: Boundary) -> tuple[Boundary, Any]:
        """Of a pair, the first as a boundary; the second with a leading axis of particles."""
        return parted(both, self.settings.num_particles)

    # --- the parts of a run, for one particle ---

    def begin(self, rng_key: Array, trace: Any) -> Carried:
        """Before the first equation; `trace` is for the source of choices."""
        models = models_of(self.staged, self.arrays)
        state = first_state(self.staged, models, self.settings.source.choices(rng_key, index(), trace))
        state = remembering(state, self.settings.generations)
        jaxpr = body_of(self.staged.jaxpr)
        values = dict(zip(jaxpr.invars, self.arrays.inputs))
        return Carried([values[v] for v in live(jaxpr, 0)], {}, {m: [] for m in range(len(models))}, state)

    def straight(self, carried: Carried, start: int, stop: int) -> Carried:
        """Equations `start` to `stop`."""
        run, env = self.interpreter(carried, start)
        run.walk_equations(body_of(self.staged.jaxpr).eqns[start:stop], env)
        return self.pause(run, env, stop)

    def enter(self, carried: Carried, at: int) -> Carried:
        """Before the first step of a loop."""
        run, env, loop = self.loop(carried, at)
        looping = loops.start(run, loop)
        return self.pause(run, env, at, (looping.carry, looping.since))

    def step(self, carried: Carried, i: Array, at: int) -> tuple[Carried, Collected]:
        """One step of a loop, and what it leaves behind."""
        run, _, loop = self.loop(carried, at)
        looping, collected = loops.one_step(run, loop, carried.looping(), i)
        return carried._replace(state=looping.state, loop=(looping.carry, looping.since)), collected

    def leave(self, carried: Carried, collected: Collected, at: int) -> Carried:
        """After a loop, of whose steps `collected` [length, ...] is left."""
        run, env, loop = self.loop(carried, at)
        outputs = loops.leave(run, loop, carried.looping(), collected)
        env.update((v, o) for v, o in zip(body_of(self.staged.jaxpr).eqns[at].outvars, outputs))
        return self.pause(run, env, at + 1)

    def cut(self, carried: Carried, collected: Collected, at: int) -> Carried:
        """In a loop that is not done: what was recorded so far, the steps to come being inactive."""
        run, _, loop = self.loop(carried, at)
        loops.gather(run, loop, carried.looping(), collected)
        return Carried([], run.recorded(), {}, run.state)

    def output(self, carried: Carried, complete: bool) -> Output:
        """What a run brings back; weights of one that is not complete are for the target with its twists."""
        values = {name: value for name, (value, _) in carried.records.items()}
        active = {name: active for name, (_, active) in carried.records.items()}
        state, returned = carried.state, []
        if complete:
            run, env = self.interpreter(carried, len(body_of(self.staged.jaxpr).eqns))
            returned = [jnp.asarray(run.frame.get(run.read(env, a))) for a in body_of(self.staged.jaxpr).outvars]
        log_weight = state.log_weight if complete else state.log_weight + total_twist(state)
        return Output(
            returned, values, active, log_weight, state.faults, state.counts, state.root, state.made, state.resamplings
        )


# --- the same for all particles, each part compiled by itself ---------------------------------------------------------


def begin(setting: Setting, rng_key: Array, trace: Any) -> Boundary:
    return setting.over(Boundary.nothing(), lambda _: setting.begin(rng_key, trace))


def straight(setting: Setting, boundary: Boundary, start: int, stop: int) -> Boundary:
    return setting.over(boundary, lambda carried: setting.straight(carried, start, stop))


def enter(setting: Setting, boundary: Boundary, at: int) -> Boundary:
    return setting.over(boundary, lambda carried: setting.enter(carried, at))


def enter_settled(setting: Setting, boundary: Boundary, at: int) -> Boundary:
    """The same, where what the loop makes different between particles is so from the first step on: each step then takes and
    gives a boundary of one kind."""
    boundary = enter(setting, boundary, at)
    while True:
        after, _ = jax.eval_shape(lambda b: step(setting, b, jnp.int32(0), at), boundary)
        wide = boundary.widened(after.axes, setting.settings.num_particles)
        if wide.axes == boundary.axes:
            return boundary
        boundary = wide


def going(setting: Setting, boundary: Boundary, at: int) -> Array:
    """bool[]: whether some particle has anything left to do in a loop, after a step of it."""
    is_while = body_of(setting.staged.jaxpr).eqns[at].primitive.name == "while"

    def one_particle(carried: Carried) -> Array:
        alive = carried.state.log_weight > -jnp.inf
        return anybody(alive & carried.loop[0][-1] if is_while else alive)

    return setting.over(boundary, one_particle).value()  # type: ignore[no-any-return]


def step(setting: Setting, boundary: Boundary, i: Array, at: int) -> tuple[Boundary, Collected]:
    """What the step leaves behind has a leading axis of particles."""
    return setting.parted(setting.over(boundary, lambda carried: setting.step(carried, i, at)))


def leave(setting: Setting, boundary: Boundary, collected: Collected, at: int) -> Boundary:
    return setting.over(boundary, lambda carried, collected: setting.leave(carried, collected, at), collected)


def cut(setting: Setting, boundary: Boundary, collected: Collected, at: int) -> Boundary:
    return setting.over(boundary, lambda carried, collected: setting.cut(carried, collected, at), collected)


def renewed(setting: Setting, boundary: Boundary, rng_key: Array) -> Boundary:
    """The same, from here on with draws of another key, and work counted anew."""

    def one_particle(carried: Carried) -> Carried:
        choices = setting.settings.source.choices(rng_key, index(), {})
        none = jax.tree.map(lambda x: x - x, carried.state.counts)  # still each particle's own
        return carried._replace(state=carried.state._replace(choices=choices, counts=none))

    return setting.over(boundary, one_particle)


def standing(setting: Setting, boundary: Boundary) -> tuple[Array, Faults, Counts]:
    """Each particle's log-weight, twists left out, what went wrong, and work done; leading axis of particles."""
    found = setting.over(boundary, lambda carried: (carried.state.log_weight, carried.state.faults, carried.state.counts))
    return found.whole(setting.settings.num_particles)  # type: ignore[no-any-return]


def output(setting: Setting, boundary: Boundary, complete: bool) -> Output:
    whole = setting.over(boundary, lambda carried: setting.output(carried, complete))
    return whole.whole(setting.settings.num_particles)  # type: ignore[no-any-return]


class SegmentedRun:
    """A run that the host drives: `advance` until `done`. It gives the same particles as the run in one call."""

    def __init__(
        self,
        staged: Staged,
        rng_key: Array,
        given: Mapping[str, Any],
        settings: Settings,
        abstract: bool = False,
        trace: Any = None,
    ):
        """With `abstract`, nothing is computed but shapes; `trace` is what the source's choices repeat."""
        self.staged, self.settings, self.abstract = staged, settings, abstract
        self.arrays, self.given = arrays_of(staged), given_arrays(staged, given)
        self.segments = segments(staged)
        self.segment = 0
        self.collected: list[Collected] = []
        self.boundary: Boundary = self.call(begin, rng_key, trace or {})

    def call(self, part: Callable[..., Any], *operands: Any, **static: int) -> Any:
        """A part of the run, compiled; with it, `part` of a `Setting`, operands, and what is compiled in."""
        skeleton, settings = self.staged.skeleton(), self.settings
        key = (self.staged.key(), settings, tuple(sorted(self.given)), part, tuple(static.items()))
        make = lambda: lambda arrays, given, *x: part(Setting(skeleton, settings, arrays, given), *x, **static)
        return self._compute(compiled(key, make), self.arrays, self.given, *operands)

    def _compute(self, fn: Callable[..., Any], *operands: Any) -> Any:
        return jax.eval_shape(fn, *operands) if self.abstract else fn(*operands)

    @property
    def done(self) -> bool:
        return self.segment == len(self.segments)

    @property
    def length(self) -> int:
        """How many steps the loop has that is under way."""
        return loops.length_of(body_of(self.staged.jaxpr).eqns[self.segments[self.segment].start])

    @property
    def tokens(self) -> int:
        """generated so far"""
        return int(self.boundary.value().state.counts.generated.sum())

    @property
    def place(self) -> str:
        """Where the run stands."""
        if self.done:
            return "the end"
        segment = self.segments[self.segment]
        names = [name for e in body_of(self.staged.jaxpr).eqns[segment.start : segment.stop] for name in names_in(e)]
        site = next((f"site {name!r}" for name in names if not name.endswith("()")), "the end")
        return f"step {len(self.collected)} of {self.length} of the loop of {site}" if segment.is_loop else site

    def advance(self) -> None:
        """Run up to the next cut."""
        segment = self.segments[self.segment]
        if not segment.is_loop:
            self.boundary = self.call(straight, self.boundary, start=segment.start, stop=segment.stop)
            self.segment += 1
            return
        at = segment.start
        if self.boundary.value().loop is None:
            self.boundary = self.call(enter_settled, self.boundary, at=at)
        if len(self.collected) < self.length:
            number = jnp.int32(len(self.collected))
            self.boundary, found = self.call(step, self.boundary, number, at=at)
            self.collected.append(found)
        if len(self.collected) == self.length:
            self.boundary = self.call(leave, self.boundary, self._stacked(self.collected), at=at)
            self.segment, self.collected = self.segment + 1, []

    def output(self) -> Output:
        """The population as it stands."""
        boundary = self.boundary
        if self.collected:
            boundary = self.call(cut, boundary, self.padded(), at=self.segments[self.segment].start)
        return self.call(output, boundary, complete=self.done)  # type: ignore[no-any-return]

    def padded(self) -> Collected:
        """What the steps of the loop under way left behind [N, length, ...], blank for those to come."""
        missing = self.length - len(self.collected)
        blank = jax.tree.map(jnp.zeros_like, self.collected[-1])._replace(moved=jnp.arange(self.settings.num_particles))
        return self._stacked([*self.collected, *[blank] * missing])

    def _stacked(self, steps: list[Collected]) -> Collected:
        return self._compute(lambda steps: jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *steps), steps)  # type: ignore[no-any-return]


def names_in(eqn: Any) -> list[str]:
    """Names of the sites of an equation and of those inside it."""
    own = [eqn.params["name"]] if is_site(eqn) and "name" in eqn.params else []
    return own + [name for inner in inner_jaxprs(eqn) for name in sites_inside(inner)]
