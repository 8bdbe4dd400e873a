"""Many problems in one batch: lanes that go on together, and free places that are taken by waiting problems."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from latentrace.ppl.errors import RunError, SiteError
from latentrace.ppl.problems import Lanes, Problems, inputs_of, stage_alike
from latentrace.ppl.program import as_program
from latentrace.ppl.run import Output, Settings
from latentrace.ppl.staging import check_given

from .driver import finish, wants_progress
from .posterior import Posterior

Array = jax.Array


@dataclass(eq=False)
class Lane:
    """The run of one problem, and where it stands."""

    problem: int
    lanes: Lanes | None = None
    """of the batch that it was in last"""
    place: int = 0
    """its place there"""
    segment: int = 0
    steps: int = 0
    """taken of the loop that it is in; 0 before it"""
    idle: bool = False
    """whether its loop has nothing left to do; one more step says what idle steps leave behind"""
    start: float = 0.0


def run_many(
    rng_key: Array,
    program: Any,
    problems: Sequence[tuple[Any, ...]],
    settings: Settings,
    *,
    at_once: int,
    return_errors: bool,
    progress: bool | None,
    finished: Callable[[Posterior], Posterior] = lambda posterior: posterior,
) -> list[Any]:
    """Run a program on each of many problems; of them `at_once` are under way at a time, at most."""
    if at_once < 1:
        raise SiteError(f"run_many: at_once must be at least 1, not {at_once}")
    if not len(problems):
        return []
    program = as_program(program)
    staged = stage_alike(program.fn, [args if isinstance(args, tuple) else (args,) for args in problems])
    check_given(staged[0], program.given)
    keys = jax.vmap(lambda number: jax.random.fold_in(rng_key, number))(jnp.arange(len(problems)))
    parts = Problems(staged[0], inputs_of(staged, program.given), keys, settings._replace(many=True))
    rounds = -(-len(problems) // at_once)
    schedule = Schedule(parts, len(problems), -(-len(problems) // rounds))
    results: list[Any] = [None] * len(problems)
    bar = tqdm(total=len(problems), unit=" problems", leave=False, delay=3, disable=not wants_progress(progress))
    try:
        for lane, output in schedule.run():
            calls, seconds = int(output.counts.model_calls.max(initial=0)), time.perf_counter() - lane.start
            try:
                results[lane.problem] = finished(finish(staged[lane.problem], output, calls=calls, seconds=seconds))
            except RunError as error:
                error.add_note(f"in problem {lane.problem}, counted from 0")
                results[lane.problem] = error
            bar.update()
    except KeyboardInterrupt:
        if all(result is None for result in results):
            raise
    finally:
        bar.close()
    errors = [result for result in results if isinstance(result, RunError)]
    if errors and not return_errors:
        errors[0].add_note(f"{len(errors)} of {len(problems)} problems failed; with return_errors=True the others are returned")
        raise errors[0]
    return results


class Schedule:
    """Which lanes go on when. Batches have one size; one that is not full repeats a lane, at no extra passes."""

    def __init__(self, parts: Problems, num_problems: int, size: int):
        self.parts, self.size = parts, size
        self.waiting = list(range(num_problems))[::-1]
        self.lanes: list[Lane] = []

    def run(self) -> Iterator[tuple[Lane, Output]]:
        """Each finished lane and its output, as they finish."""
        while self.lanes or self.waiting:
            free = self.size - len(self.lanes)
            if self.waiting and (free >= min(self._some, len(self.waiting)) or not self.lanes):
                yield from self._begin(free)
            if self.lanes:
                segment = self._next_segment()
                batch = [lane for lane in self.lanes if lane.segment == segment][: self.size]
                yield from self._advance(batch, segment)

    @property
    def _some(self) -> int:
        """How many lanes are worth a call of their own where a loop could go on instead."""
        return -(-self.size // 4)

    def _next_segment(self) -> int:
        """Lanes between loops go on when they are some, the last ones first, as they make room; else the fullest loop."""
        count = Counter(lane.segment for lane in self.lanes)
        straight = [s for s in count if not self.parts.length(s)]
        some = [s for s in straight if count[s] >= self._some]
        loops = [s for s in count if self.parts.length(s)]
        if some:
            return max(some)
        return max(loops or straight, key=lambda s: (count[s], s))

    def _begin(self, free: int) -> Iterator[tuple[Lane, Output]]:
        """Start problems that wait; a program of one segment is over at once."""
        parts, now = self.parts, time.perf_counter()
        started = [self.waiting.pop() for _ in range(min(free, len(self.waiting)))]
        lanes = [Lane(problem, start=now) for problem in started]
        self.lanes += lanes
        problems = self._filled(started)
        if parts.length(0):
            self._settle(lanes, parts.begin(problems))
        elif len(parts.segments) == 1:
            yield from self._finish(lanes, parts.whole(problems))
        else:
            self._settle(lanes, parts.open(problems))
            self._leave(lanes)

    def _advance(self, batch: list[Lane], segment: int) -> Iterator[tuple[Lane, Output]]:
        """One segment further, or one step of a loop."""
        parts, length = self.parts, self.parts.length(segment)
        last = segment == len(parts.segments) - 1
        if not length:
            problems, lanes = self._batch(batch)
            if last:
                yield from self._finish(batch, parts.close(problems, lanes))
            else:
                self._settle(batch, parts.straight(problems, lanes, segment))
                self._leave(batch)
        elif over := self._step(batch, segment, length):
            problems, lanes = self._batch(over)
            lanes = parts.leave(problems, lanes, segment)
            if last:
                yield from self._finish(over, parts.output(problems, lanes))
            else:
                self._settle(over, lanes)
                self._leave(over)

    def _step(self, batch: list[Lane], segment: int, length: int) -> list[Lane]:
        """One step of a loop for all of a batch; those which are done with it."""
        parts = self.parts
        if entering := [lane for lane in batch if not lane.steps]:
            problems, lanes = self._batch(entering)
            self._settle(entering, parts.enter(problems, lanes, segment))
        problems, lanes = self._batch(batch)
        lanes, going = parts.step(problems, lanes, self._filled([lane.steps for lane in batch]), segment)
        self._settle(batch, lanes)
        over = []
        for lane, goes in zip(batch, np.asarray(going)):
            lane.steps += 1
            if lane.steps == length or lane.idle:
                over.append(lane)
            lane.idle = not goes
        return over

    def _finish(self, batch: list[Lane], output: Output) -> Iterator[tuple[Lane, Output]]:
        output = jax.device_get(output)
        self.lanes = [lane for lane in self.lanes if lane not in batch]
        for place, lane in enumerate(batch):
            yield lane, jax.tree.map(lambda x, place=place: x[place], output)

    def _settle(self, batch: list[Lane], lanes: Lanes) -> None:
        for place, lane in enumerate(batch):
            lane.lanes, lane.place = lanes, place

    def _leave(self, batch: list[Lane]) -> None:
        for lane in batch:
            lane.segment, lane.steps, lane.idle = lane.segment + 1, 0, False

    def _filled(self, numbers: list[int]) -> Array:
        """int32[size]; the first one again where there are fewer."""
        return jnp.asarray(numbers + [numbers[0]] * (self.size - len(numbers)), jnp.int32)

    def _batch(self, batch: list[Lane]) -> tuple[Array, Lanes]:
        """Problems int32[size] and what their lanes carry; where they already lie side by side, nothing moves."""
        problems, first = self._filled([lane.problem for lane in batch]), batch[0].lanes
        assert first is not None
        if len(batch) == self.size and all(lane.lanes is first and lane.place == i for i, lane in enumerate(batch)):
            return problems, first
        sources: list[Lanes] = []
        for lane in batch:
            if lane.lanes is not None and not any(lane.lanes is known for known in sources):
                sources.append(lane.lanes)
        where = [next(i for i, known in enumerate(sources) if lane.lanes is known) for lane in batch]
        picked = [i * self.size + lane.place for i, lane in zip(where, batch)]
        return problems, _picked(sources, self._filled(picked))


@jax.jit
def _picked(sources: list[Lanes], picked: Array) -> Lanes:
    """Lanes out of several batches, by their number among all."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs)[picked], *sources)  # type: ignore[no-any-return]
