"""Objectives of a model and a guide, each a few lines of `expectation` and `log_density`.

Each is a function `(rng_key, *args) -> float32[]` whose gradient is an unbiased estimate of the gradient of its expectation;
both programs get the same arguments, such as parameters and a batch of data. Bounds are to be maximised; losses are so called.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentrace.ppl.errors import SiteError
from latentrace.ppl.program import as_program
from latentrace.ppl.staging import random_sites, stage
from latentrace.ppl.state import spread_over

from .density import log_density
from .estimators import Estimator, Reparameterised
from .expectations import Controlled, expectation
from .traces import Trace

Array = jax.Array
Objective = Callable[..., Array]


def elbo(model: Any, guide: Any, *, estimators: Mapping[str, Estimator] | None = None, num_samples: int = 1) -> Objective:
    """The evidence lower bound E_q[log p(x, z) - log q(z)] <= log p(x), nats (Jordan et al. 1999).

    Args:
        model: a program with observations; or a distribution made of one (`marginal`, `normalize`).
        guide: a program that draws the model's random sites; or a distribution made of one.
        estimators: by site, see `expectation`.
        num_samples: traces to average.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import ppl
    >>> from latentrace.inference import vi
    >>> @ppl.program
    ... def model():
    ...     heads = ppl.sample("heads", dist.Bernoulli(0.5))
    ...     ppl.observe("x", dist.Normal(heads, 1.0), 2.0)
    >>> guide = ppl.program(lambda: ppl.sample("heads", dist.Bernoulli(0.8)))
    >>> bound = vi.elbo(model, guide, estimators={"heads": vi.Enumerate()})(jax.random.key(0))
    >>> print(f"{bound:.3f}")
    -1.912
    """

    def objective(rng_key: Array, *args: Any) -> Array:
        cost = lambda trace: log_density(model, trace, *args) - trace.log_density
        return expectation(cost, guide, estimators=estimators, num_samples=num_samples)(rng_key, *args)

    return objective


def iwae(
    model: Any,
    guide: Any,
    num_traces: int,
    *,
    estimators: Mapping[str, Estimator] | None = None,
    num_samples: int = 1,
    doubly: bool = False,
) -> Objective:
    """The importance-weighted bound E[log 1/K sum_k p(x, z_k) / q(z_k)] of K traces (Burda et al. 2016), nats: the K-trace
    bound of reasoning where traces are texts.

    Choices that are not reparameterised get leave-one-out baselines as in `vimco`. `doubly` reparameterises twice (Tucker et
    al. 2019): the same expected gradient, whose noise in the guide's parameters does not grow with K. For guides all of whose
    sites are reparameterised.
    """

    def objective(rng_key: Array, *args: Any) -> Array:
        def bound(traces: Trace) -> Any:
            log_w = log_weights(model, traces, args)
            return Controlled(log_mean_exp(log_w), others_mean(log_w))

        def doubly_reparameterised(traces: Trace) -> Any:
            return _doubly(model, guide, traces, args)

        fn = doubly_reparameterised if doubly else bound
        return expectation(fn, guide, estimators=estimators, num_traces=num_traces, num_samples=num_samples)(rng_key, *args)

    return objective


def vimco(model: Any, guide: Any, num_traces: int, **options: Any) -> Objective:
    """`iwae` for guides that are not reparameterised: the baseline of one trace's choices is the bound with that trace's
    log-weight replaced by the mean of the others' (Mnih and Rezende 2016, equation 10). Takes 2 traces at least."""
    if num_traces < 2:
        raise ValueError(f"vimco compares traces with each other: num_traces must be at least 2, not {num_traces}")
    return iwae(model, guide, num_traces, **options)


def renyi(
    model: Any,
    guide: Any,
    num_traces: int,
    alpha: float,
    *,
    estimators: Mapping[str, Estimator] | None = None,
    num_samples: int = 1,
) -> Objective:
    """The variational Renyi bound E[1 / (1 - alpha) log 1/K sum_k (p / q)^(1 - alpha)] of K traces (Li and Turner 2016), nats.
    At alpha 0 it is `iwae`; near 1 it tends to `elbo`. Its gradient is unbiased for this K-trace bound, which itself tends to
    the Renyi divergence as K grows."""
    if alpha == 1:
        raise ValueError("renyi: at alpha 1 the bound is vi.elbo")

    def objective(rng_key: Array, *args: Any) -> Array:
        def bound(traces: Trace) -> Any:
            powers = (1 - alpha) * log_weights(model, traces, args)
            return Controlled(log_mean_exp(powers) / (1 - alpha), others_mean(powers) / (1 - alpha))

        return expectation(bound, guide, estimators=estimators, num_traces=num_traces, num_samples=num_samples)(rng_key, *args)

    return objective


def chi_squared(
    model: Any,
    guide: Any,
    *,
    log_scale: float = 0.0,
    estimators: Mapping[str, Estimator] | None = None,
    num_samples: int = 1,
) -> Objective:
    """E_q[(p(x, z) / q(z) / exp(log_scale))^2], a loss: half its log, plus log_scale, is an upper bound of log p(x) (CUBO,
    Dieng et al. 2017). A `log_scale` near the log evidence keeps it near 1; the log itself would make the gradient biased."""

    def objective(rng_key: Array, *args: Any) -> Array:
        def cost(trace: Trace) -> Array:
            log_w = (log_density(model, trace, *args) - trace.log_density).nats
            return jnp.exp(2 * (log_w - log_scale))

        return expectation(cost, guide, estimators=estimators, num_samples=num_samples)(rng_key, *args)

    return objective


def forward_kl(guide: Any) -> Callable[..., Array]:
    """-E_p[log q(z)], a loss whose minimum is the guide nearest to p in KL(p || q): a function (traces, log_weights, *args).

    `traces` holds values by site of N weighted draws of p, with a leading axis, such as `posterior.values` of any algorithm,
    and `log_weights` their float32[N], nats. Nothing else is random. With self-normalised weights of draws from elsewhere the
    gradient is that of their weighted mean.

    Text sites take token ids, int32[N, ..., max_tokens].
    """

    def objective(traces: Mapping[str, Any], log_weights: Array, *args: Any) -> Array:
        log_q = jax.vmap(lambda values: log_density(guide, values, *args).nats)(dict(traces))
        weights = importance_weights(log_weights)
        return -jnp.where(weights > 0, weights * log_q, 0.0).sum()

    return objective


def wake_phase(model: Any, guide: Any, num_traces: int) -> Objective:
    """Both wake phases of reweighted wake-sleep (Bornschein and Bengio 2015), to be maximised: for the model's parameters the
    gradient of the K-trace bound, for the guide's that of -KL(p || q), by the same self-normalised weights w_k.

    sum_k w_k (log p(x, z_k) + log q(z_k)), with z_k fixed. For the guide it is biased at finite K, as self-normalised averages
    are (of order 1/K); it needs no gradient through values, so that discrete sites and texts cost nothing more. Parameters that
    both programs share get both.
    """

    def objective(rng_key: Array, *args: Any) -> Array:
        def cost(traces: Trace) -> Array:
            fixed = jax.lax.stop_gradient(traces)
            log_p = log_density(model, fixed, *args).nats
            log_q = log_density(guide, fixed, *args).nats
            weights = importance_weights(log_p - log_q)
            surrogate = (weights * jnp.where(weights > 0, log_p + log_q, 0.0)).sum()
            value = log_mean_exp(log_p - log_q)
            return jax.lax.stop_gradient(value - surrogate) + surrogate

        # traces are drawn from the guide as it is: only what the weights say has a gradient
        still = jax.lax.stop_gradient(args)
        return expectation(cost, guide, num_traces=num_traces)(rng_key, *still)

    return objective


def sleep_phase(prior: Any, guide: Any, guide_args: Callable[..., tuple[Any, ...]], *, num_samples: int = 1) -> Objective:
    """E[log q(z | x)] over traces (x, z) of a generative program, to be maximised: the sleep phase of wake-sleep (Hinton et al.
    1995).

    Args:
        prior: a program that draws both latent and observed sites.
        guide: draws the latent ones.
        guide_args: of the prior's trace and the arguments: the guide's arguments, such as `lambda trace, params: (params,
            trace.values["x"])`.
    """

    def objective(rng_key: Array, *args: Any) -> Array:
        def cost(trace: Trace) -> Array:
            trace = jax.lax.stop_gradient(trace)
            inputs = guide_args(trace, *args)
            return log_density(guide, trace.only(_random(guide, inputs), jnp.float32(0)), *inputs).nats

        return expectation(cost, prior, num_samples=num_samples)(rng_key, *jax.lax.stop_gradient(args))

    return objective


def log_weights(model: Any, traces: Trace, args: tuple[Any, ...]) -> Array:
    """log p(x, z) - log q(z) of several traces, float32[K], nats."""
    return (log_density(model, traces, *args) - traces.log_density).nats


def importance_weights(log_w: Array) -> Array:
    """Normalised weights of float32[..., K] nats, constants to differentiation; zeros where every trace is impossible."""
    possible = (log_w > -jnp.inf).any(axis=-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(possible, log_w, 0.0), axis=-1)
    return jax.lax.stop_gradient(jnp.where(possible, weights, 0.0))


def log_mean_exp(log_w: Array) -> Array:
    """log of the mean of exp(log_w) over the last axis."""
    return jax.nn.logsumexp(log_w, axis=-1) - np.log(log_w.shape[-1])


def others_mean(log_w: Array) -> Array:
    """For each of K traces the bound in which its log-weight is the mean of the others'; float32[K], zeros for one trace."""
    count = log_w.shape[-1]
    if count == 1:
        return jnp.zeros(1)
    log_w = jax.lax.stop_gradient(log_w)
    mean = (log_w.sum() - log_w) / (count - 1)
    replaced = jnp.where(jnp.eye(count, dtype=bool), mean[:, None], log_w[None, :])
    return log_mean_exp(replaced)


def _doubly(model: Any, guide: Any, traces: Trace, args: tuple[Any, ...]) -> Array:
    """The bound of K traces with the doubly reparameterised gradient: the guide's parameters move values alone, and what moves
    value z_k counts w_k^2 times, w_k being the normalised weight."""
    if rough := [name for name, estimator in traces.plan.of.items() if not isinstance(estimator, Reparameterised)]:
        raise SiteError(f"site {rough[0]!r} is not reparameterised, let alone doubly; leave `doubly` out")
    log_w = jax.lax.stop_gradient(log_weights(model, traces, args))
    weights = importance_weights(log_w)

    def scaled(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        still = jax.lax.stop_gradient(x)
        return still + spread_over(weights, x) * (x - still)

    moved = replace(traces, values=jax.tree.map(scaled, traces.values))
    log_p = log_density(model, moved, *args).nats
    log_q = log_density(guide, moved, *jax.lax.stop_gradient(args)).nats
    surrogate = (weights * jnp.where(weights > 0, log_p - log_q, 0.0)).sum()
    return jax.lax.stop_gradient(log_mean_exp(log_w) - surrogate) + surrogate


def _random(program: Any, args: tuple[Any, ...]) -> list[str]:
    return random_sites(stage(as_program(program).fn, args))
