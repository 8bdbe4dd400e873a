"""Many problems at once: one program with different arguments, run side by side, segment by segment.

A *lane* is the run of one problem. Lanes at the same segment go through it together in one compiled call: the particles'
axis inside, that of problems outside. In a loop each lane may be at a step of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import segments
from .collectives import over_problems
from .errors import SiteError
from .jaxpr import all_eqns, body_of
from .loops import Collected, length_of
from .run import Arrays, Output, Settings, arrays_of, compiled, given_arrays, runner
from .segments import Boundary, Setting
from .sites import extend_p, prompt_p, score_p
from .staging import Staged, stage
from .state import Counts, Faults

Array = jax.Array


def stage_alike(fn: Callable[..., Any], problems: Sequence[tuple[Any, ...]]) -> list[Staged]:
    """A program staged for each problem's arguments, texts padded to one length, so that one compiled run serves all.

    Raises `SiteError` where the problems lead to different programs.
    """
    found = [stage(fn, args) for args in problems]
    texts = [_text_lengths(staged) for staged in found]
    longest = max((length for lengths in texts for length in lengths), default=0)
    shorter = lambda lengths: any(length < longest for length in lengths)
    if len(set(map(tuple, texts))) > 1:
        found = [stage(fn, a, pad_to=longest) if shorter(lengths) else s for s, a, lengths in zip(found, problems, texts)]
    first = found[0].key()
    for number, staged in enumerate(found):
        if number and staged.key() != first:
            raise SiteError(
                f"problem {number} stages to another program than problem 0: problems may differ in arrays and in texts. Pass "
                "numbers as arrays, and give options, functions and models one value for all"
            )
        if any(ours is not theirs for ours, theirs in zip(staged.models, found[0].models)):
            raise SiteError(f"problem {number} has another language model than problem 0; give all the same one")
    return found


def _text_lengths(staged: Staged) -> list[int]:
    """Tokens of each given text, padding included."""
    given = (prompt_p, extend_p, score_p)
    return [e.invars[-1].aval.shape[0] for e in all_eqns(staged.jaxpr) if e.primitive in given]


class Inputs(NamedTuple):
    """What several runs read. A leaf is `shared` by all of them, or stacked in `own`; the other is None."""

    shared: list[Any]
    own: list[Any]
    models: list[list[Any]]
    tree: Any
    """structure of the leaves: arrays without models, and given values"""

    def of(self, problem: Array) -> tuple[Arrays, dict[str, Array]]:
        """Arrays and given values of one problem."""
        leaves = [shared if own is None else own[problem] for shared, own in zip(self.shared, self.own)]
        arrays, given = jax.tree.unflatten(self.tree, leaves)
        return Arrays(arrays.inputs, arrays.consts, self.models), given


def inputs_of(staged: Sequence[Staged], given: Mapping[str, Any]) -> Inputs:
    """The inputs of several programs that are staged alike; arrays that are the same object are shared."""
    flat = [jax.tree.flatten((arrays_of(s)._replace(models=[]), given_arrays(s, given))) for s in staged]
    columns = list(zip(*[leaves for leaves, _ in flat]))
    alike = [all(x is column[0] for x in column) for column in columns]
    own = [None if same else jnp.stack(column) for same, column in zip(alike, columns)]
    shared = [column[0] if same else None for same, column in zip(alike, columns)]
    return Inputs(shared, own, arrays_of(staged[0]).models, flat[0][1])


def inputs_with(staged: Staged, given: Mapping[str, Array], own: Mapping[str, Array]) -> Inputs:
    """The inputs of several runs of one program, to each of which `own` gives values too: leading axis of runs."""
    arrays = arrays_of(staged)
    common = arrays._replace(models=[])
    leaves, names = jax.tree.leaves(common), sorted({**given, **own})  # as JAX flattens a dict
    shared = [*leaves, *[given.get(name) for name in names]]
    stacked = [*[None] * len(leaves), *[own.get(name) for name in names]]
    return Inputs(shared, stacked, arrays.models, jax.tree.structure((common, {**given, **own})))


class Lanes(NamedTuple):
    """What some lanes carry, stacked."""

    boundary: Boundary
    collected: Collected | None = None
    """in a loop, what its steps left behind so far: [lanes, particles, steps, ...]; what is to come is as the latest step"""


class Problems:
    """The compiled parts of runs of one structure with inputs of their own, each for a batch of lanes."""

    def __init__(self, staged: Staged, inputs: Inputs, keys: Array, settings: Settings):
        """`keys` [P] are the keys of the runs."""
        self.staged, self.inputs, self.keys, self.settings = staged.skeleton(), inputs, keys, settings
        self.segments = segments.segments(self.staged)
        self._key = (staged.key(), settings, inputs.tree)

    def _call(self, fn: Callable[..., Any], problems: Array, *operands: Any, **static: Any) -> Any:
        """`fn(setting, *operands, **static)` for each of a batch of problems, int32[B]."""
        staged, settings, tree = self.staged, self.settings, self.inputs.tree

        def run(shared: Any, own: Any, models: Any, problems: Array, *operands: Any) -> Any:
            def one_problem(problem: Array, *operands: Any) -> Any:
                arrays, given = Inputs(shared, own, models, tree).of(problem)
                return fn(Setting(staged, settings, arrays, given), *operands, **static)

            return over_problems(one_problem, 0)(problems, *operands)

        key = (*self._key, fn, tuple(static.items()))
        return compiled(key, lambda: run)(*self.inputs[:3], problems, *operands)

    def length(self, segment: int) -> int:
        """How many steps the loop of a segment has; 0 where it is none."""
        where = self.segments[segment]
        return length_of(body_of(self.staged.jaxpr).eqns[where.start]) if where.is_loop else 0

    def begin(self, problems: Array) -> Lanes:
        """Before the first segment, for problems int32[B]."""
        return Lanes(self._call(segments.begin, problems, self.keys[problems], {}))

    def open(self, problems: Array) -> Lanes:
        """After the first segment, which is no loop, in one call: nothing but what is needed later is brought back."""
        return Lanes(self._call(_open, problems, self.keys[problems], stop=self.segments[0].stop))

    def close(self, problems: Array, lanes: Lanes) -> Output:
        """What lanes bring back that stand before the last segment, which is no loop, in one call."""
        last = self.segments[-1]
        return self._call(_close, problems, lanes.boundary, start=last.start, stop=last.stop)  # type: ignore[no-any-return]

    def whole(self, problems: Array) -> Output:
        """The whole run of a program of one segment that is no loop, in one call."""
        return self._call(_whole, problems, self.keys[problems])  # type: ignore[no-any-return]

    def straight(self, problems: Array, lanes: Lanes, segment: int) -> Lanes:
        """Through a segment that is no loop."""
        where = self.segments[segment]
        return self.stretch(problems, lanes, where.start, where.stop)

    def stretch(self, problems: Array, lanes: Lanes, start: int, stop: int) -> Lanes:
        """Through equations `start` to `stop` of the top level, loops whole."""
        return Lanes(self._call(segments.straight, problems, lanes.boundary, start=start, stop=stop))

    def enter(self, problems: Array, lanes: Lanes, segment: int) -> Lanes:
        """Before the first step of a loop."""
        return Lanes(*self._call(_enter, problems, lanes.boundary, at=self.segments[segment].start))

    def step(self, problems: Array, lanes: Lanes, steps: Array, segment: int) -> tuple[Lanes, Array]:
        """Each lane's next step of a loop, number int32[B]; and bool[B], whether anything is left for the steps to come."""
        at = self.segments[segment].start
        boundary, collected, going = self._call(_step, problems, lanes.boundary, lanes.collected, steps, at=at)
        return Lanes(boundary, collected), going

    def leave(self, problems: Array, lanes: Lanes, segment: int) -> Lanes:
        """After a loop."""
        return Lanes(self._call(segments.leave, problems, lanes.boundary, lanes.collected, at=self.segments[segment].start))

    def renewed(self, problems: Array, lanes: Lanes) -> Lanes:
        """The same, from here on with draws of the keys, and work counted anew."""
        return lanes._replace(boundary=self._call(segments.renewed, problems, lanes.boundary, self.keys[problems]))

    def standing(self, problems: Array, lanes: Lanes) -> tuple[Array, Faults, Counts]:
        """Log-weights, twists left out, what went wrong, and work done; leading axes of lanes and particles."""
        return self._call(segments.standing, problems, lanes.boundary)  # type: ignore[no-any-return]

    def output(self, problems: Array, lanes: Lanes, complete: bool = True) -> Output:
        """What lanes bring back that are at the end, or else somewhere between loops; leading axes of lanes and particles."""
        return self._call(segments.output, problems, lanes.boundary, complete=complete)  # type: ignore[no-any-return]


def _open(setting: Setting, rng_key: Array, stop: int) -> Boundary:
    return segments.straight(setting, segments.begin(setting, rng_key, {}), 0, stop)


def _close(setting: Setting, boundary: Boundary, start: int, stop: int) -> Output:
    return segments.output(setting, segments.straight(setting, boundary, start, stop), complete=True)


def _whole(setting: Setting, rng_key: Array) -> Output:
    return runner(setting.staged, setting.settings)(rng_key, jnp.int32(0), setting.arrays, setting.given, {})  # type: ignore[no-any-return]


def _enter(setting: Setting, boundary: Boundary, at: int) -> tuple[Boundary, Collected]:
    """Before a loop's first step, and room for what its steps leave behind."""
    boundary = segments.enter_settled(setting, boundary, at)
    _, found = jax.eval_shape(partial(segments.step, setting, at=at), boundary, jnp.int32(0))
    length = length_of(body_of(setting.staged.jaxpr).eqns[at])
    room = lambda x: jnp.zeros((x.shape[0], length, *x.shape[1:]), x.dtype)
    return boundary, jax.tree.map(room, found)


def _step(setting: Setting, boundary: Boundary, collected: Collected, i: Array, at: int) -> tuple[Boundary, Collected, Array]:
    """One step. What it leaves behind stands for the later steps too, until they come: idle steps are all alike."""
    boundary, found = segments.step(setting, boundary, i, at)
    length = collected.moved.shape[1]
    number = jnp.arange(length)
    write = lambda old, new: jnp.where((number >= i).reshape(-1, *[1] * (new.ndim - 1)), new[:, None], old)
    collected = jax.tree.map(write, collected, found)
    nobody_moved = jnp.arange(setting.settings.num_particles)[:, None]
    collected = collected._replace(moved=jnp.where(number > i, nobody_moved, collected.moved))
    return boundary, collected, segments.going(setting, boundary, at)
