"""Traces that a guide draws, and densities of programs at them, inside differentiated functions."""

import math
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl import sites
from latentrace.ppl.choices import Choices, Repeating, SiteRef, visited
from latentrace.ppl.credit import Redrawn
from latentrace.ppl.decode import weighted
from latentrace.ppl.errors import SiteError, SiteNameError, near_misses
from latentrace.ppl.interpreter import Interpreter, first_state
from latentrace.ppl.notes import About, Notes, walked
from latentrace.ppl.program import as_program
from latentrace.ppl.run import Arrays, Settings, arrays_of, given_arrays, label_values, models_of, runner
from latentrace.ppl.staging import Staged, random_sites, stage, trace_eqns

from . import watched
from .estimators import Estimator, MeasureValued, ScoreFunction, default
from .terms import LogDensity

Array = jax.Array
side_by_side: ContextVar[bool] = ContextVar("side_by_side", default=False)
"""whether what is being traced runs side by side with others, on the axis of problems"""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "returned", "log_density", "log_q", "numbers", "active"],
    meta_fields=["plan", "many"],
)
@dataclass(frozen=True)
class Trace:
    """What a guide drew; with a leading axis of traces where there are `many`."""

    values: dict[str, Any]
    """of every site; a `Text` for generated ones"""
    returned: Any
    log_density: LogDensity
    """of the guide, differentiable in its parameters and through reparameterised values"""
    log_q: dict[str, Array]
    """of each choice by site, float32, nats: an axis for each loop and plate, and of tokens last for a text"""
    numbers: dict[str, Array]
    """int32: which of the trace's choices each is"""
    active: dict[str, Array]
    """bool: which of them there are"""
    plan: "Plan"
    many: bool = False

    def only(self, names: Collection[str], nats: Array) -> "Trace":
        """The same with the values of some sites alone, and their log density."""
        part = lambda found: {name: x for name, x in found.items() if name in names}
        kept = replace(self, values=part(self.values), log_q=part(self.log_q), log_density=LogDensity(nats))
        return replace(kept, numbers=part(self.numbers), active=part(self.active))


@jax.tree_util.register_static
class Plan:
    """The estimator of every random site of a guide."""

    def __init__(self, staged: Staged, chosen: Mapping[str, Estimator], given: Any = ()):
        self.staged = staged.skeleton()
        self.random = [name for name in random_sites(staged) if name not in given]
        for name in chosen:
            if name not in self.random:
                raise SiteNameError(f"estimator of site {name!r}: the guide has no such site; {near_misses(name, self.random)}")
        self.equations = {eqn.params["name"]: eqn for eqn in trace_eqns(staged.jaxpr) if eqn.primitive is sites.sample_p}
        self.dims = {name: staged.sites[name].dims for name in self.random}
        self.choices = sum(math.prod(self.dims[name]) * max(1, staged.sites[name].max_tokens) for name in self.random)
        self.of: dict[str, Estimator] = {}
        for name in self.random:
            if name not in self.equations:
                self.of[name] = chosen.get(name, ScoreFunction())
                if not isinstance(self.of[name], ScoreFunction):
                    raise SiteError(f"site {name!r} is a text, whose estimator is vi.ScoreFunction(); found {self.of[name]}")
                continue
            distribution = abstract(self.equations[name])
            self.of[name] = chosen.get(name) or default(distribution)
            self.of[name].check(name, distribution)

    def auxiliary(self, name: str) -> bool:
        """Whether a site is noise that others are made of."""
        return name in self.equations and self.equations[name].params["auxiliary"]

    def names(self, kind: type) -> list[str]:
        return [name for name, estimator in self.of.items() if isinstance(estimator, kind)]

    @property
    def credits(self) -> bool:
        """Whether anybody asks what a choice has cost."""
        return bool(self.names(ScoreFunction))

    def support(self, name: str) -> tuple[float, ...]:
        found = self.equations[name].params["support"]
        if found is None:
            raise SiteError(
                f"site {name!r}: its support depends on traced values and cannot be enumerated; choose vi.ScoreFunction()"
            )
        return found  # type: ignore[no-any-return]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a site's values, axes of loops and plates first."""
        return (*self.dims[name], *self.equations[name].params["out"][0])

    def visit(
        self, site: SiteRef, distribution: Any, value: Array, choices: Choices, number: Array
    ) -> tuple[Array, dict[str, Any]]:
        """The log density of a value, and what else its estimator needs of it."""
        estimator, found = self.of[site.name], dict[str, Any]()
        again = lambda: Draws(choices.drawn, site, number)  # type: ignore[attr-defined]
        if (score := estimator.score(distribution, value, again())) is not None:
            found["score"] = score.astype(jnp.float32)
        if isinstance(estimator, MeasureValued):
            found["pairs"] = list(estimator.pairs(distribution, value, again()))
        return estimator.log_prob(distribution, value, again()), found


def abstract(eqn: Any) -> Any:
    """The distribution of a site, with placeholders for parameters."""
    p = eqn.params
    leaves = eqn.invars[:-1] if p["scaled"] else eqn.invars
    if p["scaled"]:
        raise SiteError(
            f"site {p['name']!r} of a guide is scaled, so that its draws are not of its density; leave the scale out"
        )
    return p["tree"].unflatten([jnp.zeros(v.aval.shape, v.aval.dtype) for v in leaves])


class Draws:
    """Draws of one visit of a site: the first is keyed by the site, others by their number too."""

    def __init__(self, drawn: Choices, site: SiteRef, number: Array):
        self.drawn, self.site, self.number, self.count = drawn, site, number, 0

    def __call__(self, distribution: Any) -> Array:
        site = self.site if not self.count else SiteRef(self.site.name, (*self.site.path, self.count))
        self.count += 1
        value, self.drawn = self.drawn.value(site, distribution, self.number)
        return value  # type: ignore[no-any-return]


class _Estimated(NamedTuple):
    drawn: Choices
    fixed: dict[str, tuple[Array, Array]]
    """for a site, where its values are replaced (bool), and by what; axes of loops and plates first"""
    plan: Plan


class Estimated(Repeating, _Estimated):
    """The choices of a guide's trace, each drawn as its estimator says; `fixed` ones are replaced."""

    __slots__ = ()

    def value(self, site: SiteRef, distribution: Any, number: Array) -> tuple[Array, "Estimated"]:
        draws = Draws(self.drawn, site, number)
        value = self.plan.of[site.name].draw(distribution, draws)
        if site.name in self.fixed:
            there, instead = visited(self.fixed[site.name], site)
            value = jnp.where(there, jax.lax.stop_gradient(instead).astype(value.dtype), value)
        return value, self._replace(drawn=draws.drawn)


class Draft(NamedTuple):
    """How one trace is drawn."""

    choices: Any
    """Keyed choices"""
    fixed: dict[str, tuple[Array, Array]]


class Source(NamedTuple):
    """The choices of a population of traces, of which `trace` holds each one's `Draft`."""

    plan: Plan

    def choices(self, rng_key: Array, particle: Array, trace: Draft) -> Choices:
        mine: Draft = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, particle, keepdims=False), trace)
        return Estimated(mine.choices, mine.fixed, self.plan)


class Drawn(NamedTuple):
    """One trace as the interpreter records it; or several, on a leading axis."""

    values: dict[str, Any]
    active: dict[str, Array]
    returned: list[Array]
    about: dict[str, About]
    log_weight: Array
    """float32[], nats: the density of given values, if there are"""


def stage_guide(guide: Any, args: tuple[Any, ...]) -> Staged:
    """A staged guide; errors for what a guide must not hold."""
    program = as_program(guide)
    if program.given:
        raise SiteError(f"the guide has given values ({', '.join(program.given)}); a guide draws all of its sites")
    staged = stage(program.fn, args)
    for eqn in trace_eqns(staged.jaxpr):
        if eqn.primitive in (sites.observe_p, sites.factor_p, sites.score_p):
            raise SiteError(
                f"site {eqn.params['name']!r} weighs the guide's traces ({eqn.primitive.name}); a guide only draws: leave it "
                "to the model, or make a distribution of the program with vi.normalize"
            )
        if eqn.primitive is sites.generate_p and weighted(eqn.params):
            raise SiteError(
                f"site {eqn.params['name']!r} of the guide is not drawn from its model itself but by a constraint, proposal or "
                "twist; a guide's texts are plain: adapt the model in their place, by a prompt or by training"
            )
    watched.note(staged)
    if not random_sites(staged):
        raise SiteError("the guide has no random site")
    return staged


def draw_traces(staged: Staged, plan: Plan, drafts: Draft, size: int, given: Mapping[str, Any] | None = None) -> Drawn:
    """`size` traces, one for each draft (leading axis), with some values given to all. Texts are drawn first, by one decoding
    loop for all traces, and then read by one differentiable pass."""
    arrays, skeleton = arrays_of(staged), staged.skeleton()
    known = given_arrays(staged, given or {})
    texts = {name: Redrawn(tokens) for name, tokens in _texts(skeleton, arrays, plan, drafts, size, known).items()}

    def one(draft: Draft, texts: dict[str, Redrawn]) -> Drawn:
        state = first_state(skeleton, models_of(skeleton, arrays), Estimated(*draft, plan), jnp.int32(0))
        run = interpreter(skeleton, arrays, state, {**texts, **known})
        run.notes, run.is_density = Notes(visit=plan.visit), False
        cells = run.walk(skeleton.jaxpr, [run.frame.put(x) for x in arrays.inputs])
        found = walked(run, cells)
        return Drawn(found.values, found.active, found.returned, found.notes, run.state.log_weight)

    return over_leading(one, drafts, texts)  # type: ignore[no-any-return]


def over_leading(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn` over the leading axis; over that of one element without a batch dimension."""
    if jax.tree.leaves(args)[0].shape[0] > 1:
        return jax.vmap(fn)(*args)
    return jax.tree.map(lambda x: x[None], fn(*jax.tree.map(lambda x: x[0], args)))


def trace_of(staged: Staged, plan: Plan, drawn: Drawn) -> Trace:
    """One trace as objectives see it."""
    counted = [name for name in plan.random if watched.site.get() in (None, name)]
    log_q = sum((drawn.about[name].log_q.sum() for name in counted), jnp.float32(0))
    by_choice = None
    if plan.credits:
        by_choice = jnp.zeros(plan.choices + 1, jnp.float32)
        for name in plan.random:
            about = drawn.about[name]
            by_choice = by_choice.at[about.number + 1].add(jax.lax.stop_gradient(about.log_q))
    log_qs = {name: drawn.about[name].log_q for name in plan.random}
    numbers = {name: drawn.about[name].number for name in plan.random}
    active = {name: drawn.active[name] for name in plan.random}
    returned = staged.out_tree.unflatten(drawn.returned)
    return Trace(label_values(staged, drawn.values), returned, LogDensity(log_q, by_choice), log_qs, numbers, active, plan)


def _texts(staged: Staged, arrays: Arrays, plan: Plan, drafts: Draft, size: int, given: dict[str, Array]) -> dict[str, Array]:
    """Tokens of the guide's texts, drawn without gradient."""
    names = [name for name in plan.random if name not in plan.equations]
    if not names:
        return {}
    fixed = jax.lax.stop_gradient((arrays, given, drafts))
    run = runner(staged, Settings(size, Source(plan), many=side_by_side.get()))
    output = run(jax.random.key(0), jnp.int32(0), *fixed)
    return {name: output.values[name][0] for name in names}


def scores(plan: Plan, about: Mapping[str, About]) -> dict[str, Array]:
    """Of sites that are not reparameterised, what the cost of each choice is multiplied by; axes as in `Trace.log_q`."""
    found = {}
    for name in plan.random:
        if name not in plan.equations:  # a text
            found[name] = about[name].log_q
        elif "score" in about[name].more:
            found[name] = about[name].more["score"]
    return found


def interpreter(staged: Staged, arrays: Arrays, state: Any, given: Mapping[str, Any]) -> Interpreter:
    consts = dict(zip(staged.consts, arrays.consts))
    # else the compiler evaluates what a fresh cache leads to, at length
    state = state._replace(arenas=jax.lax.optimization_barrier(state.arenas)) if state.arenas else state
    run = Interpreter(staged, consts, models_of(staged, arrays), state, given=dict(given), axes=())
    run.only = watched.site.get()
    return run
