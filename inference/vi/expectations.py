"""Expectations over what a guide draws, with unbiased gradients."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latentrace.ppl.choices import Keyed
from latentrace.ppl.collectives import PROBLEMS
from latentrace.ppl.errors import SiteError
from latentrace.ppl.staging import Staged
from latentrace.ppl.state import spread_over

from .estimators import Enumerate, Estimator, MeasureValued
from .randomness import inner_randomness
from .terms import LogDensity
from .traces import Draft, Drawn, Plan, Trace, draw_traces, over_leading, scores, side_by_side, stage_guide, trace_of

Array = jax.Array
Fixed = dict[str, tuple[Array, Array]]
MOST_COMBINATIONS = 100_000


class Controlled(NamedTuple):
    """What a function of several traces may return: its value, and a baseline for the choices of each trace."""

    value: Any
    """float32[]"""
    baselines: Array
    """float32[num_traces]; each must not depend on the choices of its own trace"""


@dataclass(frozen=True)
class Expectation:
    """The expectation of a function of a guide's traces; see `expectation`. Calling it estimates it."""

    fn: Callable[..., Any]
    guide: Any
    estimators: Mapping[str, Estimator] = field(default_factory=dict)
    num_traces: int | None = None
    num_samples: int = 1
    has_aux: bool = False

    def __call__(self, rng_key: Array, *args: Any) -> Any:
        """An unbiased estimate float32[], whose gradient is an unbiased estimate of the gradient; `args` are the guide's."""
        fn, guide, num_traces = self.fn, self.guide, self.num_traces
        while hasattr(guide, "around"):  # a distribution made of a program
            fn, guide, num_traces = guide.around(fn, num_traces, args)
        if hasattr(guide, "expect"):  # a sampler of its own, which has no gradient
            if self.estimators:
                raise SiteError(
                    f"estimators: {type(guide).__name__} has no gradient to estimate in its sampler; leave them out"
                )
            value, aux = guide.expect(fn, num_traces, self.num_samples, rng_key, args, self.has_aux)
            return (value, aux) if self.has_aux else value
        staged = stage_guide(guide, args)
        plan = Plan(staged, self.estimators)
        value, aux = _Estimate(rng_key, fn, staged, plan, num_traces, self.num_samples, self.has_aux).value()
        return (value, aux) if self.has_aux else value


def expectation(
    fn: Callable[[Trace], Any],
    guide: Any,
    *,
    estimators: Mapping[str, Estimator] | None = None,
    num_traces: int | None = None,
    num_samples: int = 1,
    has_aux: bool = False,
) -> Expectation:
    """E[fn(trace)] over traces that `guide` draws: a function `(rng_key, *args) -> float32[]`, `args` being the guide's.

    It returns an unbiased estimate, and its gradient with respect to anything that `guide` or `fn` reads is an unbiased
    estimate of the gradient of the expectation, unless an estimator is marked as biased. So an objective is a few lines:

    >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
    >>> from latentrace import ppl
    >>> from latentrace.inference import vi
    >>> @ppl.program
    ... def model(loc):
    ...     z = ppl.sample("z", dist.Normal(0.0, 1.0))
    ...     ppl.observe("x", dist.Normal(z, 1.0), 2.0)
    >>> @ppl.program
    ... def guide(loc):
    ...     ppl.sample("z", dist.Normal(loc, 0.7))
    >>> def elbo(rng_key, loc):
    ...     cost = lambda trace: vi.log_density(model, trace, loc) - trace.log_density
    ...     return vi.expectation(cost, guide, num_samples=1000)(rng_key, loc)
    >>> gradient = jax.grad(elbo, argnums=1)(jax.random.key(0), 0.3)  # 2 - 2 loc
    >>> bool(abs(gradient - 1.4) < 0.1)
    True

    Args:
        fn: of a `Trace`, or of `num_traces` of them at once (leading axes). Returns float[] or a `LogDensity`; of several
            traces also a `Controlled`. It must not use an expectation's estimate otherwise than linearly, as in all of
            statistics.
        guide: a program without observations, or a distribution made of one (`marginal`, `normalize`).
        estimators: by site; by default `Reparameterised` where that exists, else `ScoreFunction`.
        num_samples: independent evaluations to average, which serve each other as baselines.
        has_aux: whether `fn` returns a pair of its value and something else, a pytree of arrays, whose mean comes back beside
            the estimate.

    Raises `SiteError` where an estimator does not suit its site, and for a guide that weighs its traces.
    """
    return Expectation(fn, guide, dict(estimators or {}), num_traces, num_samples, has_aux)


class _Costs(NamedTuple):
    """What the function says, with leading axes [S, V]: samples, and variants of each."""

    value: Array
    to_go: Array | None
    """float32[S, V, M]: of each choice, where known"""
    baselines: Array | None
    """float32[S, V, K], of each trace"""
    inner: Array | None
    """float32[S, V]: scores of randomness in the function itself"""
    aux: Any
    """what else it returns"""


class _Estimate:
    """One estimate. Arrays have leading axes [S, V, K]: samples, variants of each by what is enumerated or replaced, and
    traces."""

    def __init__(
        self,
        rng_key: Array,
        fn: Callable[..., Any],
        staged: Staged,
        plan: Plan,
        num_traces: int | None,
        num_samples: int,
        has_aux: bool,
    ):
        self.rng_key, self.fn, self.staged, self.plan = rng_key, fn, staged, plan
        self.joint, self.traces, self.samples = num_traces is not None, num_traces or 1, num_samples
        self.has_aux = has_aux

    def value(self) -> tuple[Array, Any]:
        """The surrogate whose value is the estimate, and whose gradient is that of the expectation; and what else there is."""
        fixed, nonzero, variants = self.combinations()
        drawn = self.draw(fixed, variants)
        costs = self.costs(drawn)
        surrogate = costs.value + self.scored(drawn, costs)
        weights = self.weights(drawn, nonzero) if fixed else jnp.ones(surrogate.shape)
        if fixed:
            surrogate = jnp.where(weights > 0, weights * surrogate, 0.0)
        aux = jax.tree.map(lambda x: (spread_over(weights, x) * x).sum(axis=1).mean(axis=0), costs.aux)
        return (surrogate.sum(axis=1) + self.differences(drawn)).mean(), jax.lax.stop_gradient(aux)

    def combinations(self) -> tuple[Fixed, dict[str, np.ndarray], int]:
        """All values of the enumerated sites, with leading axes [V, K], where they are not the first of the support, and V."""
        names = self.plan.names(Enumerate)
        shapes = {name: (self.traces, *self.plan.shape(name)) for name in names}
        radices = [len(self.plan.support(name)) for name in names for _ in range(math.prod(shapes[name]))]
        count = math.prod(radices)
        if count > MOST_COMBINATIONS:
            raise SiteError(
                f"sites {', '.join(map(repr, names))}: enumeration takes {count:,} combinations, over {MOST_COMBINATIONS:,}; "
                "choose vi.MeasureValued(), which tries the values of one visit at a time, or vi.ScoreFunction()"
            )
        if count > 1 and self.plan.names(MeasureValued):
            raise SiteError("vi.Enumerate and vi.MeasureValued in one guide are not supported; choose one of both")
        digits = np.stack(np.unravel_index(np.arange(count), radices), axis=-1) if radices else np.zeros((1, 0), int)
        fixed, nonzero, start = {}, {}, 0
        for name, shape in shapes.items():
            mine = digits[:, start : start + math.prod(shape)].reshape(count, *shape)
            values = jnp.asarray(np.asarray(self.plan.support(name))[mine])
            fixed[name], nonzero[name] = (jnp.ones(values.shape, bool), values), mine != 0
            start += math.prod(shape)
        return fixed, nonzero, count

    def draw(self, fixed: Fixed, variants: int) -> Drawn:
        """Traces of all samples; variants of one have its randomness in common. `fixed` has axes [V, K] or [S, V, K]."""
        shape = self.samples, variants, self.traces
        size = math.prod(shape)
        number = jnp.broadcast_to(jnp.arange(self.samples * self.traces).reshape(self.samples, 1, self.traces), shape)

        def spread(x: Array, name: str) -> Array:
            axes = x.shape[x.ndim - len(self.plan.shape(name)) :]
            return jnp.broadcast_to(x, (*shape, *axes)).reshape(size, *axes)

        spreads = {name: (spread(there, name), spread(values, name)) for name, (there, values) in fixed.items()}
        keys = jnp.broadcast_to(self.rng_key, (size,))
        drafts = Draft(Keyed(keys, number.reshape(size).astype(jnp.int32)), spreads)
        drawn = draw_traces(self.staged, self.plan, drafts, size)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), drawn)

    def costs(self, drawn: Drawn) -> _Costs:
        """What the function says of each sample's traces."""

        def one(drawn: Drawn, sample: Array) -> _Costs:
            with inner_randomness(self.rng_key, sample) as inner:
                if self.joint:
                    traces = jax.vmap(partial(trace_of, self.staged, self.plan))(drawn)
                    found = self.fn(replace(traces, many=True))
                else:
                    found = self.fn(trace_of(self.staged, self.plan, jax.tree.map(lambda x: x[0], drawn)))
            return self.checked(found, sum(inner.scores) if inner.scores else None)

        return over_leading(lambda drawn, s: over_leading(lambda drawn: one(drawn, s), drawn), drawn, jnp.arange(self.samples))

    def checked(self, found: Any, inner: Any) -> _Costs:
        """What the function returned, taken apart."""
        baselines, aux = None, ()
        if self.has_aux:
            found, aux = found
        if isinstance(found, Controlled):
            found, baselines = found.value, found.baselines
            if jnp.shape(baselines) != (self.traces,):
                raise SiteError(
                    f"vi.Controlled: expected {self.traces} baselines, one for each trace; found {jnp.shape(baselines)}"
                )
        value, to_go = (found.nats, found.to_go()) if isinstance(found, LogDensity) else (found, None)
        if jnp.shape(value) != ():
            raise SiteError(f"the function of an expectation must return one number, found shape {jnp.shape(value)}; reduce it")
        return _Costs(jnp.asarray(value, jnp.float32), None if self.joint else to_go, baselines, inner, aux)

    def scored(self, drawn: Drawn, costs: _Costs) -> Array:
        """float32[S, V]: 0, with the gradient that comes through choices that are not reparameterised."""
        total = jnp.zeros(costs.value.shape, jnp.float32)
        for name, score in scores(self.plan, drawn.about).items():
            number = drawn.about[name].number
            cost = spread_over(costs.value, number)
            if costs.to_go is not None:
                flat = number.reshape(*costs.value.shape, -1)
                cost = jnp.take_along_axis(costs.to_go, flat, axis=-1).reshape(number.shape)
            elif costs.baselines is not None:
                cost = cost - spread_over(costs.baselines, number)
            total += self.multiplied(cost - self.baseline(name, cost), score).sum(axis=tuple(range(2, score.ndim)))
        if costs.inner is not None:
            total += self.multiplied(costs.value - self.others(costs.value), costs.inner)
        return total

    def baseline(self, name: str, cost: Array) -> Any:
        """What a site's costs [S, V, ...] are compared with."""
        given = getattr(self.plan.of[name], "baseline", None)
        return jax.lax.stop_gradient(jnp.asarray(given)) if given is not None else self.others(cost)

    def others(self, cost: Array) -> Any:
        """The mean over the other samples; 0 where there are none."""
        return (cost.sum(axis=0) - cost) / (self.samples - 1) if self.samples > 1 else 0.0

    def multiplied(self, cost: Array, score: Array) -> Array:
        """0, with the gradient of cost times score. What is impossible has none: the value says so already."""
        finite = jax.lax.stop_gradient(jnp.where(jnp.isfinite(cost), cost, 0.0))
        return finite * (score - jax.lax.stop_gradient(score))

    def weights(self, drawn: Drawn, nonzero: Mapping[str, np.ndarray]) -> Array:
        """float32[S, V]: the probability of the enumerated values. An inactive choice has its first value only."""
        log_weight: Any = 0.0
        for name, more in nonzero.items():
            active = drawn.active[name]
            again = more.any(axis=tuple(range(active.ndim - 1, more.ndim))) & ~active
            log_q = jnp.where(again, -jnp.inf, drawn.about[name].log_q)
            log_weight += log_q.sum(axis=tuple(range(2, log_q.ndim)))
        return jnp.exp(log_weight)

    def differences(self, drawn: Drawn) -> Array:
        """float32[S]: 0, with the gradient of measure-valued sites."""
        total = jnp.zeros(self.samples, jnp.float32)
        for name in self.plan.names(MeasureValued):
            shape = (self.traces, *self.plan.shape(name))
            size = math.prod(shape)
            there = jnp.eye(size, dtype=bool).reshape(size, *shape)
            for parameter, coefficient, *both in drawn.about[name].more["pairs"]:
                plus, minus = (
                    self.costs(self.draw({name: (there, x)}, size)).value.reshape(self.samples, 1, *shape) for x in both
                )
                by_element = self.multiplied(coefficient * (plus - minus), parameter)
                total += by_element.sum(axis=tuple(range(1, by_element.ndim)))
        return total


def mean_over(objective: Callable[..., Array]) -> Callable[..., Array]:
    """The mean of an objective over a batch: a function `(rng_key, *args, batch)`, where `objective(rng_key, *args, item)`
    takes one item, arrays without the batch's leading axis. Each item has randomness of its own.

    As `jax.vmap` does, but that guides which write texts decode those of all items in one loop without waste.
    """

    def batched(rng_key: Array, *args: Any) -> Array:
        *shared, batch = args
        keys = jax.random.split(rng_key, jax.tree.leaves(batch)[0].shape[0])
        token = side_by_side.set(True)
        try:
            values = jax.vmap(lambda key, item: objective(key, *shared, item), axis_name=PROBLEMS)(keys, batch)
        finally:
            side_by_side.reset(token)
        return jax.tree.map(lambda x: x.mean(axis=0), values)  # type: ignore[no-any-return]

    return batched
