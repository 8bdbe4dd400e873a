"""Particle Gibbs with ancestor sampling: the trace that is repeated draws, at each resampling, whose past it goes on from.

In conditional SMC the retained particle keeps its whole past, so that after a few resamplings all particles share its early
values, and the chain hardly moves them. Here it takes the past of particle j with probability proportional to
w_j gamma(x_j, x') / gamma_t(x_j), where gamma is the density of the whole trace that joins j's past x_j and the retained
trace's rest x' (Lindsten, Jordan and Schon 2014, algorithm 2; programs are not Markovian: section 6). A walk of what is left
of the program from particle j's state, with the retained values given, ends with just that log-weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl import loops
from latentrace.ppl.choices import Choices, at_points
from latentrace.ppl.collectives import PARTICLES, gather, index, over_particles, reindex
from latentrace.ppl.decode import weighted
from latentrace.ppl.errors import SiteError
from latentrace.ppl.jaxpr import all_eqns, body_of, inner_jaxprs, scan_of
from latentrace.ppl.lineage import resample
from latentrace.ppl.loops import Collected
from latentrace.ppl.run import Output, RetainingSource, Settings
from latentrace.ppl.segments import Carried, Segment, Setting, names_in
from latentrace.ppl.sites import NESTED, factor_p, generate_p, observe_p, plate_p, sample_p, score_p, twist_p
from latentrace.ppl.staging import Staged, holds_sites, trace_eqns
from latentrace.ppl.state import Counts, total_twist

from ..chains import Draw, Target
from .conditional import ConditionalSMC
from .smc import Resample

Array = jax.Array


class Trace(NamedTuple):
    """The trace that particle 0 repeats."""

    values: dict[str, Array]
    """of every random site that is not given; token ids for texts"""
    active: dict[str, Array]


class Joining(NamedTuple):
    """Resample as conditional SMC does, but let place 0 draw its ancestor too."""

    conditional: Resample
    log_joint: Array
    """float32[]: log density of this particle's past with the retained trace's rest, over the proposal of that past"""
    inside_texts: bool = False
    axes: tuple[str, ...] = (PARTICLES,)

    def __call__(self, choices: Choices, clock: Array, chance: Array, log_weight: Array) -> tuple[Array, Array, Array, Choices]:
        due, ancestor, after, choices = self.conditional(choices, clock, chance, log_weight)
        log_joint = gather(self.log_joint)
        best = log_joint.max()
        own = jnp.arange(log_joint.shape[0]) == 0  # its own past fits at any rate
        weights = jnp.where(best > -jnp.inf, jnp.exp(log_joint - best), own)
        weights = weights / weights.sum()
        uniforms, choices = choices.uniforms(~clock, weights, 1)  # numbers below 0 are free: clocks start from 0
        return due, jnp.where(due & (index() == 0), at_points(weights, uniforms)[0], ancestor), after, choices


class Sweep(NamedTuple):
    """One sweep of the kernel over a program."""

    drawing: Setting
    """in which particles draw, but for the one that repeats"""
    repeating: Setting
    """in which every value of the retained trace is given"""
    trace: Trace
    policy: Resample

    @property
    def eqns(self) -> list[Any]:
        return body_of(self.drawing.staged.jaxpr).eqns  # type: ignore[no-any-return]

    def to_the_end(self, rng_key: Array) -> Carried:
        """The whole sweep, for one particle."""
        carried = self.drawing.begin(rng_key, self.trace.values)
        for start, stop, is_loop in pieces(self.drawing.staged, self.drawing.given):
            if is_loop:
                carried = self.loop(carried, start)
                continue
            if start > 0 and draws(self.eqns[start], self.drawing.given):
                carried, _ = self.cut(carried, None, start)
            carried = self.drawing.straight(carried, start, stop)
        return carried

    def loop(self, carried: Carried, at: int) -> Carried:
        """A loop at the top level, cut before each step."""
        length = loops.length_of(self.eqns[at])
        carried = self.drawing.enter(carried, at)
        shapes = jax.eval_shape(lambda carried: self.drawing.step(carried, jnp.int32(0), at)[1], carried)
        nothing = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), shapes)

        def one_step(both: tuple[Carried, Collected], i: Array) -> Any:
            carried, collected = self.cut(*both, at, i)
            return advance(self.drawing, carried, collected, at, i), None

        steps = jnp.arange(length, dtype=jnp.int32)
        (carried, collected), _ = jax.lax.scan(one_step, (carried, nothing), steps)
        return self.drawing.leave(carried, collected, at)

    def cut(self, carried: Carried, collected: Any, at: int, i: Array | None = None) -> tuple[Carried, Any]:
        """Before equation `at`, or step `i` of the loop that it is, whose steps so far are `collected`: resample if due."""
        state = carried.state
        due, *_ = self.policy(state.choices, state.clock, state.chances, state.log_weight + total_twist(state))
        log_joint, counts, non_finite = jax.lax.cond(
            due & (state.clock != state.asked),
            lambda: self.judge(carried, collected, at, i),
            lambda: (jnp.float32(0), state.counts, state.faults.non_finite),
        )
        state = state._replace(counts=counts, faults=state.faults._replace(non_finite=non_finite))
        values = carried.env, carried.records, carried.loop, collected
        state, values, ancestor = resample(Joining(self.policy, log_joint), state, values)
        env, records, loop, collected = values
        return Carried(env, records, reindex(carried.prompts, ancestor), state, loop), collected

    def judge(self, carried: Carried, collected: Any, at: int, i: Array | None) -> tuple[Array, Counts, Array]:
        """The log-weight of this particle's past with the retained trace's rest; work done up to there, and what was wrong."""
        end = len(self.eqns)
        if i is None:
            whole = self.repeating.straight(carried, at, end)
        else:
            length = loops.length_of(self.eqns[at])
            go_on = lambda t, both: advance(self.repeating, both[0], both[1], at, t)
            carried, collected = jax.lax.fori_loop(i, length, go_on, (carried, collected))
            whole = self.repeating.straight(self.repeating.leave(carried, collected, at), at + 1, end)
        state = whole.state
        log_joint = jnp.where(self.fits(whole.records, at, i), state.log_weight, -jnp.inf)
        return log_joint, state.counts, state.faults.non_finite

    def fits(self, records: Mapping[str, tuple[Any, Array]], at: int, i: Array | None) -> Array:
        """Whether the sites of the rest are active where they were in the retained trace: a value that was not drawn there
        makes no joint trace."""
        same = jnp.asarray(True)
        for number, eqn in enumerate(self.eqns[at:], start=at):
            for name in {*names_in(eqn)} & {*self.trace.values}:
                equal = records[name][1] == self.trace.active[name]
                if number == at and i is not None:
                    done = jnp.arange(equal.shape[0]) < i
                    done = done[::-1] if eqn.primitive.name == "scan" and scan_of(eqn).reverse else done
                    equal |= done.reshape(-1, *[1] * (equal.ndim - 1))
                same &= equal.all()
        return same


def advance(setting: Setting, carried: Carried, collected: Collected, at: int, i: Array) -> tuple[Carried, Collected]:
    """Step `i` of the loop that equation `at` is; what it leaves behind goes to its row."""
    carried, found = setting.step(carried, i, at)
    return carried, jax.tree.map(lambda rows, row: rows.at[i].set(row), collected, found)


def pieces(staged: Staged, given: Mapping[str, Any]) -> list[Segment]:
    """The program's top-level equations, in pieces: one begins before each draw that follows a weight; loops that draw stand
    by themselves."""
    found, start, weighed = [], 0, False
    eqns = body_of(staged.jaxpr).eqns
    for i, eqn in enumerate(eqns):
        drawn = draws(eqn, given)
        is_loop = drawn and eqn.primitive.name in ("scan", "while") and loops.length_of(eqn) > 0
        if start < i and (is_loop or (drawn and weighed)):
            found.append(Segment(start, i, False))
            start, weighed = i, False
        if is_loop:
            found.append(Segment(i, i + 1, True))
            start, weighed = i + 1, True
        weighed |= weighs(eqn, given)
    return found if start == len(eqns) else [*found, Segment(start, len(eqns), False)]


def equations_of(eqn: Any) -> list[Any]:
    """An equation, and all those inside it."""
    return [eqn, *(e for inner in inner_jaxprs(eqn) for e in all_eqns(inner))] if holds_sites(eqn) else [eqn]


def draws(eqn: Any, given: Mapping[str, Any]) -> bool:
    """Whether an equation draws something."""
    return any(e.primitive in (sample_p, generate_p) and e.params["name"] not in given for e in equations_of(eqn))


def weighs(eqn: Any, given: Mapping[str, Any]) -> bool:
    """Whether an equation may move weights."""

    def one(e: Any) -> bool:
        if e.primitive is sample_p:
            return e.params["scaled"] or e.params["name"] in given
        if e.primitive is generate_p:
            return weighted(e.params) or e.params["name"] in given
        return e.primitive in (observe_p, factor_p, twist_p, score_p)

    return any(map(one, equations_of(eqn)))


def sweep_of(target: Target, trace: Trace, given: dict[str, Array], policy: Resample, settings: Settings) -> Sweep:
    """A sweep in which particle 0 repeats `trace`; `policy` is that of conditional SMC."""
    staged, arrays, given = target.staged, target.arrays, {**target.given, **given}
    drawing = Setting(staged, settings, arrays, given)
    repeating = Setting(
        staged, settings._replace(steered=False), arrays, {**given, **trace.values}, drawn=frozenset(trace.values)
    )
    return Sweep(drawing, repeating, trace, policy)


@dataclass(frozen=True)
class AncestorSampling(ConditionalSMC):
    """The kernel of particle Gibbs with ancestor sampling (see `inference.ParticleGibbs`).

    >>> from latentrace.inference.mcmc import AncestorSampling
    >>> AncestorSampling(num_particles=8).num_particles
    8
    """

    def check(self, target: Target) -> None:
        super().check(target)
        for eqn in trace_eqns(target.staged.jaxpr):
            p = eqn.params
            if eqn.primitive is plate_p and p["role"] == NESTED:
                raise SiteError(
                    f"nested {p['name'].removesuffix('()')!r}: ancestor sampling needs densities, and `ppl.nested` only "
                    "estimates its own; call its function in its place, or leave out ancestor_sampling"
                )
            if eqn.primitive is generate_p and p["draft"] is not None and p["proposal"] is not None:
                raise SiteError(
                    f"site {p['name']!r}: ancestor sampling cannot tell which tokens a draft with `then` may propose; leave "
                    "out `then` or ancestor_sampling"
                )

    def population(self, target: Target, rng_key: Array, draw: Draw, policy: Resample) -> Output:
        values = target.choices(draw)
        given = {name: values.pop(name) for name in self.sites}
        trace = Trace(values, {name: draw.active[name] for name in values})
        sweep = sweep_of(target, trace, given, policy, Settings(self.num_particles, RetainingSource(), steered=True))
        one_particle = lambda: sweep.drawing.output(sweep.to_the_end(rng_key), complete=True)
        return over_particles(one_particle, self.num_particles)  # type: ignore[no-any-return]
