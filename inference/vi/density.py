"""Log densities of programs at traces, inside differentiated functions: sums whose terms know on which choices they may
depend."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Delta, biject_to

from latentrace.ppl import sites
from latentrace.ppl.choices import Keyed
from latentrace.ppl.credit import Credit, Known
from latentrace.ppl.errors import SiteError, SiteNameError, near_misses
from latentrace.ppl.interpreter import first_state
from latentrace.ppl.program import as_program
from latentrace.ppl.run import arrays_of, given_arrays
from latentrace.ppl.staging import Staged, check_given, random_sites, stage, trace_eqns

from . import watched
from .terms import LogDensity
from .traces import Plan, Trace, abstract, interpreter

Array = jax.Array


def log_density(program: Any, trace: Trace | Mapping[str, Any], *args: Any) -> LogDensity:
    """The log density of a program at a trace, differentiable in all that it reads: its arguments, and the trace's values.

    Conditions, factors, observed and scored texts of the program count, as in `Program.log_density`. A trace in which other
    sites are active than in the program has density 0.

    Args:
        program: a program, or a distribution made of one (`vi.marginal`, `vi.normalize`), whose density is estimated.
        trace: a guide's, or values by name. Several traces (`vi.expectation(num_traces=)`) give float32[num_traces].

    Raises `SiteNameError` for a random site that the trace lacks, or one of the trace that the program lacks; `SiteError` for
    values of another shape or dtype, or that are drawn from where the program's density is 0.
    """
    if hasattr(program, "estimate_at"):
        return program.estimate_at(trace, args)  # type: ignore[no-any-return]
    program = as_program(program)
    staged = stage(program.fn, args)
    check_given(staged, program.given)
    if not isinstance(trace, Trace):
        return LogDensity(_weight(staged, {**program.given, **trace}, {}, None)[0])
    _check_names(staged, program.given, trace)
    _check_sites(staged, trace.plan)

    def one(values: dict[str, Any], numbers: dict[str, Array], active: dict[str, Array]) -> LogDensity:
        nats, by_choice, found = _weight(staged, {**program.given, **values}, numbers, trace.plan)
        same = jnp.asarray([jnp.array_equal(found[name], active[name]) for name in values] or True).all()
        return LogDensity(jnp.where(same, nats, -jnp.inf), by_choice)

    values = {name: trace.values[name] for name in trace.numbers if not trace.plan.auxiliary(name)}
    return (jax.vmap(one) if trace.many else one)(values, trace.numbers, trace.active)


def _weight(
    staged: Staged, values: Mapping[str, Any], numbers: Mapping[str, Array], plan: Plan | None
) -> tuple[Array, Array | None, dict[str, Array]]:
    """The log density with these values given, its terms by choice if the plan asks, and which sites are active."""
    check_given(staged, values)
    watched.note(staged)
    if missing := [name for name in random_sites(staged) if name not in values]:
        _check_auxiliary(staged, missing[0])
        raise SiteNameError(
            f"log_density: no value for the program's site {missing[0]!r}; {near_misses(missing[0], list(values))}"
        )
    given: dict[str, Any] = given_arrays(staged, values)
    given.update((name, Known(given[name], number)) for name, number in numbers.items() if name in values)
    arrays = arrays_of(staged)
    state = first_state(staged, staged.models, Keyed(jax.random.key(0), jnp.int32(0)), jnp.int32(0))
    if plan is not None and plan.credits:
        state = state._replace(credit=Credit.nothing(plan.choices))
    run = interpreter(staged.skeleton(), arrays, state, given)
    run.walk(staged.jaxpr, [run.frame.put(x) for x in arrays.inputs])
    active = {name: run.frame.get(a) for name, (_, a) in run.records.items()}
    credit = run.state.credit
    return run.state.log_weight, None if credit is None else credit.slots, active


def _check_auxiliary(staged: Staged, name: str) -> None:
    """What is made of noise has a density where it was drawn, but at no other value."""
    for eqn in trace_eqns(staged.jaxpr):
        if eqn.params.get("name") == name and eqn.params.get("auxiliary"):
            raise SiteError(
                f"site {name!r} is auxiliary: sites made of it, as by vi.flow and vi.implicit, have no density at given "
                "values; take a guide whose sites are drawn by themselves"
            )


def _check_names(staged: Staged, given: Mapping[str, Any], trace: Trace) -> None:
    """The guide draws what the model leaves open, and nothing else."""
    wanted = [name for name in random_sites(staged) if name not in given]
    drawn = [name for name in trace.numbers if not trace.plan.auxiliary(name)]
    for name in wanted:
        if name not in drawn:
            raise SiteNameError(f"the guide draws no value for the model's site {name!r}; {near_misses(name, drawn)}")
    for name in drawn:
        if name in given:
            raise SiteNameError(f"the guide draws site {name!r}, whose value is given in the model; drop one of both")
        if name not in wanted:
            raise SiteNameError(
                f"the guide draws site {name!r}, which the model has not; {near_misses(name, wanted)}. What a guide draws "
                "besides is integrated out by vi.marginal"
            )


def _check_sites(staged: Staged, plan: Plan) -> None:
    """Sites of one name hold values of one kind, and the guide's lie where the model's density is positive."""
    models = {eqn.params["name"]: eqn for eqn in trace_eqns(staged.jaxpr) if eqn.primitive is sites.sample_p}
    for name in plan.random:
        if name not in staged.sites:
            continue
        site, drawn = staged.sites[name], plan.staged.sites[name]
        kind = lambda s: f"{s.kind} of {s.max_tokens} tokens" if s.out is None else f"{s.out[1]}{[*s.out[0]]}"
        if (site.kind, site.out, site.max_tokens) != (drawn.kind, drawn.out, drawn.max_tokens):
            raise SiteError(f"site {name!r}: the guide draws {kind(drawn)}, the model wants {kind(site)}; make them one kind")
        if site.dims != drawn.dims:
            raise SiteError(
                f"site {name!r}: the guide draws it in loops and plates of {[*drawn.dims]}, the model in those of "
                f"{[*site.dims]}"
            )
        if name in models:
            _check_support(name, plan.equations[name], models[name])


def _check_support(name: str, guide: Any, model: Any) -> None:
    """Refuse what is certain: a guide on all reals for a positive value, or values that the model never takes."""
    q, p = (eqn.params["support"] for eqn in (guide, model))
    if q is not None and p is not None:
        if outside := sorted({*q} - {*p}):
            raise SiteError(f"site {name!r}: the guide draws {outside[0]:g}, which the model's distribution never takes")
        return
    drawn, wanted = abstract(guide), abstract(model).support
    if isinstance(drawn, Delta):  # a function of other sites
        return
    of = drawn.support
    if jax.tree.leaves((of, wanted)) or of.is_discrete or wanted.is_discrete:
        return  # bounds may be anything
    with jax.ensure_compile_time_eval():
        shape = tuple(biject_to(of).inverse_shape(guide.params["out"][0]))
        points = [np.full(shape, x, np.float32) for x in (-2.0, 0.0, 2.0)]
        inside = all(bool(np.all(wanted(biject_to(of)(jnp.asarray(x))))) for x in points)
    if not inside:
        raise SiteError(
            f"site {name!r}: the guide's support is {_called(of)}, the model's {_called(wanted)}: where they differ the "
            "model's density is 0; transform the guide's distribution, by numpyro.distributions.TransformedDistribution for one"
        )


def _called(support: Any) -> str:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return type(support).__name__.strip("_").lower()
