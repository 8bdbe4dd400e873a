"""Distributions made of programs, whose densities have no closed form but unbiased estimates.

Each can be the guide or the model of any objective. For a guide the *reciprocal* density is estimated without bias, for a model
the density itself: by Jensen's inequality a lower bound of the log evidence stays one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from latentrace.ppl.choices import Keyed, SiteRef
from latentrace.ppl.errors import SiteError, SiteNameError, near_misses

from .density import log_density
from .estimators import Enumerate, Estimator, MeasureValued
from .objectives import log_mean_exp, log_weights
from .randomness import current
from .terms import LogDensity
from .traces import Draft, Plan, Trace, draw_traces, over_leading, scores, stage_guide, trace_of

Array = jax.Array
Draw = Callable[..., tuple[Any, Array]]


@dataclass(frozen=True)
class Marginal:
    """The distribution of some of a program's sites; see `marginal`."""

    program: Any
    keep: tuple[str, ...]
    proposal: Any = None
    num_particles: int = 1
    estimators: Mapping[str, Estimator] = field(default_factory=dict)

    def around(self, fn: Callable[..., Any], num_traces: int | None, args: tuple[Any, ...]) -> tuple[Any, Any, int | None]:
        """An expectation over this distribution as one over the program's whole traces."""

        def of_whole(trace: Trace) -> Any:
            self._check(list(trace.numbers))
            many = trace if trace.many else jax.tree.map(lambda x: x[None], trace)
            others = self._log_weights(many.values, self.num_particles - 1, args)
            nats = log_mean_exp(jnp.concatenate([self._own(many, args)[:, None], others], axis=1))
            return fn(trace.only(self.keep, nats if trace.many else nats[0]))

        return of_whole, self.program, num_traces

    def estimate_at(self, trace: Trace | Mapping[str, Any], args: tuple[Any, ...]) -> LogDensity:
        """The log of an unbiased estimate of the density of the kept sites' values."""
        values, many = (trace.values, trace.many) if isinstance(trace, Trace) else (trace, False)
        self._check(list(values))
        kept = {name: values[name] for name in self.keep}
        kept = kept if many else jax.tree.map(lambda x: jnp.asarray(x)[None], kept)
        nats = log_mean_exp(self._log_weights(kept, self.num_particles, args))
        return LogDensity(nats if many else nats[0])

    def _own(self, traces: Trace, args: tuple[Any, ...]) -> Array:
        """float32[N], nats: log weights of what the traces drew themselves and do not keep."""
        if self.proposal is None:
            total = lambda x: x.sum(axis=tuple(range(1, x.ndim)))
            return sum((total(traces.log_q[name]) for name in self.keep), jnp.float32(0))

        def log_proposal(trace: Trace) -> Array:
            kept = {name: trace.values[name] for name in self.keep}
            rest = trace.only([name for name in trace.numbers if name not in self.keep], jnp.float32(0))
            return log_density(self.proposal, replace(rest, many=False), kept, *args).nats

        return traces.log_density.nats - over_leading(log_proposal, traces)

    def _log_weights(self, values: Mapping[str, Any], count: int, args: tuple[Any, ...]) -> Array:
        """float32[N, count], nats: of fresh draws of what is integrated out, for each of N kept values (leading axis)."""
        kept = {name: values[name] for name in self.keep}
        size = jax.tree.leaves(kept)[0].shape[0]
        if not count:
            return jnp.zeros((size, 0), jnp.float32)
        draw = drawing("the density of a vi.marginal", self.estimators, count)

        def one(kept: dict[str, Any], i: Array) -> tuple[Array, Array]:
            tokens = {name: getattr(x, "tokens", x) for name, x in kept.items()}
            if self.proposal is None:
                return draw(self.program, args, i, lambda trace, log_kept: log_kept, given=tokens)

            def log_weight(trace: Trace, _: Array) -> Array:
                whole = log_density(self.program, {**tokens, **{name: trace.values[name] for name in trace.numbers}}, *args)
                return whole.nats - trace.log_density.nats

            return draw(self.proposal, (kept, *args), i, log_weight)

        return _scored(over_leading(one, kept, jnp.arange(size, dtype=jnp.int32)))

    def _check(self, found: list[str]) -> None:
        for name in self.keep:
            if name not in found:
                raise SiteNameError(f"vi.marginal keeps site {name!r}, which does not exist; {near_misses(name, found)}")


@dataclass(frozen=True)
class Normalized:
    """The posterior of a program as its inner sampler approximates it; see `normalize`."""

    program: Any
    proposal: Any
    num_particles: int
    estimators: Mapping[str, Estimator] = field(default_factory=dict)

    def around(self, fn: Callable[..., Any], num_traces: int | None, args: tuple[Any, ...]) -> tuple[Any, Any, int | None]:
        """An expectation over this distribution as one over the particles that compete for each trace."""

        def of_particles(particles: Trace) -> Any:
            inner, log_w = current("a vi.normalize"), log_weights(self.program, particles, args)
            key = inner.next_key()

            def choose(log_w: Array, i: Array) -> tuple[Array, Array]:
                law = dist.Categorical(logits=log_w)
                which, _ = Keyed(key, i).value(SiteRef("which"), law, jnp.int32(0))
                return which, law.log_prob(which)

            rows = log_w.reshape(-1, self.num_particles)
            which, log_p = over_leading(choose, rows, jnp.arange(rows.shape[0], dtype=jnp.int32))
            inner.scores.append(log_p.sum())
            at = which + jnp.arange(rows.shape[0]) * self.num_particles
            chosen = jax.tree.map(lambda x: x[at] if num_traces is not None else x[at[0]], particles)
            log_gamma = chosen.log_density.nats + (log_w[at] if num_traces is not None else log_w[at[0]])
            evidence = log_mean_exp(rows) if num_traces is not None else log_mean_exp(rows)[0]
            return fn(replace(chosen, many=num_traces is not None).only(list(particles.numbers), log_gamma - evidence))

        return of_particles, self.proposal, self.num_particles * (num_traces or 1)

    def estimate_at(self, trace: Trace | Mapping[str, Any], args: tuple[Any, ...]) -> LogDensity:
        """The log of an unbiased estimate of the density of what the inner sampler yields: the trace competes with fresh
        ones."""
        log_gamma = log_density(self.program, trace, *args).nats
        log_own = jnp.atleast_1d(log_gamma - log_density(self.proposal, trace, *args).nats)
        rows = log_own[:, None]
        if self.num_particles > 1:
            draw = drawing("the density of a vi.normalize", self.estimators, self.num_particles - 1)
            weigh = lambda trace, _: (log_density(self.program, trace, *args) - trace.log_density).nats
            one = lambda _, i: draw(self.proposal, args, i, weigh)
            fresh = _scored(over_leading(one, log_own, jnp.arange(log_own.shape[0], dtype=jnp.int32)))
            rows = jnp.concatenate([rows, fresh], axis=1)
        return LogDensity(log_gamma - log_mean_exp(rows).reshape(jnp.shape(log_gamma)))


def marginal(
    program: Any,
    keep: Any,
    *,
    proposal: Any = None,
    num_particles: int = 1,
    estimators: Mapping[str, Estimator] | None = None,
) -> Marginal:
    """The distribution of the sites `keep` of a program, the others being integrated out by importance sampling.

    With K particles v_1 ... v_K of the other sites the density estimate is 1/K sum_k p(z, v_k) / r(v_k | z). As a guide, v_1 is
    what was drawn together with z, so that the reciprocal is unbiased, and `vi.elbo` is that of hierarchical variational models
    (Ranganath et al. 2016), importance-weighted for K > 1 (Sobolev and Vetrov 2019); in `vi.iwae` it is doubly so.

    Args:
        program: a program without observations.
        keep: the names of the sites that are kept.
        proposal: a program of (values of the kept sites, *args) that draws all other sites. None for the program itself, with
            the kept sites given.
        num_particles: K.
        estimators: of the proposal's sites; those of the program go to the objective.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import ppl
    >>> from latentrace.inference import vi
    >>> @ppl.program
    ... def model():
    ...     ppl.observe("x", dist.Normal(ppl.sample("z", dist.Normal(0.0, 1.0)), 1.0), 1.0)
    >>> @ppl.program
    ... def wide():
    ...     ppl.sample("z", dist.Normal(ppl.sample("shift", dist.Normal(0.5, 0.3)), 0.6))
    >>> bound = vi.elbo(model, vi.marginal(wide, ["z"], num_particles=20), num_samples=500)(jax.random.key(0))
    >>> -1.6 < bound < -1.4  # log evidence is -1.515
    Array(True, dtype=bool)
    """
    _check_particles("vi.marginal", num_particles)
    kept = (keep,) if isinstance(keep, str) else tuple(keep)
    return Marginal(program, kept, proposal, num_particles, dict(estimators or {}))


def normalize(
    program: Any, proposal: Any, num_particles: int, *, estimators: Mapping[str, Estimator] | None = None
) -> Normalized:
    """The posterior of a program as sampling-importance-resampling yields it: of `num_particles` traces of the proposal one is
    drawn by its weight p(x, z) / q(z).

    Its density at a trace is estimated by the trace's joint density over an estimate of the evidence in which the trace itself
    takes part. As a guide it is the nearer to the posterior the more particles there are; its ELBO is `vi.iwae` of as many
    traces of the proposal (Domke and Sheldon 2018).

    Args:
        program: a program with observations.
        proposal: a guide of it.
        estimators: of the proposal's sites where the result is a model, fresh particles being drawn inside the objective.
    """
    _check_particles("vi.normalize", num_particles)
    return Normalized(program, proposal, num_particles, dict(estimators or {}))


def _check_particles(what: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{what}: num_particles must be a whole number of at least 1, found {count!r}")


def drawing(what: str, estimators: Mapping[str, Estimator], count: int) -> Draw:
    """How to draw inside an expectation's function: of a guide, its arguments, the number i of what is estimated and a function
    of a trace and the log density of given values, that function of `count` draws (leading axis), and the sum of their
    scores."""
    key = current(what).next_key()

    def draw(
        guide: Any, args: tuple[Any, ...], i: Array, fn: Callable[..., Any], given: Mapping[str, Any] | None = None
    ) -> tuple[Any, Array]:
        staged = stage_guide(guide, args)
        plan = Plan(staged, estimators, given or ())
        if plan.names(Enumerate) or plan.names(MeasureValued):
            raise SiteError(f"{what}: inside an estimate a site is reparameterised or has a vi.ScoreFunction()")
        numbers = i * count + jnp.arange(count, dtype=jnp.int32)
        drafts = Draft(Keyed(jnp.broadcast_to(key, (count,)), numbers), {})
        drawn = draw_traces(staged, plan, drafts, count, given)
        score = sum((x.sum() for x in scores(plan, drawn.about).values()), jnp.float32(0))
        return over_leading(lambda one: fn(trace_of(staged, plan, one), one.log_weight), drawn), score

    return draw


def _scored(found: tuple[Array, Array]) -> Array:
    """What was estimated, the scores of its randomness (leading axis) being left with the expectation."""
    values, score = found
    current("an estimate").scores.append(score.sum())
    return values
