"""The log evidence between two bounds, whose distance says how good a guide is."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .density import log_density
from .expectations import expectation
from .objectives import iwae, log_mean_exp, log_weights

Array = jax.Array


def evidence_bounds(model: Any, guide: Any, num_traces: int) -> Callable[..., tuple[Array, Array]]:
    """A function `(rng_key, exact, *args) -> (lower, upper)`, float32[] each, nats, with E[lower] <= log p(x) <= E[upper].

    The lower bound is `iwae`'s of `num_traces` traces. In the upper one `exact`, the values by site of one draw from the
    posterior, competes with one trace less (Grosse et al. 2015, Sobolev and Vetrov 2019). Exact draws are known where data are
    simulated from the model, by enumeration, or by rejection. With one trace the distance of the expected bounds is KL(q || p)
    + KL(p || q); the guide is perfect iff it is 0.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import ppl
    >>> from latentrace.inference import vi
    >>> @ppl.program
    ... def model():
    ...     ppl.observe("x", dist.Normal(ppl.sample("z", dist.Normal(0.0, 1.0)), 1.0), 1.0)
    >>> guide = ppl.program(lambda: ppl.sample("z", dist.Normal(0.5, 0.5**0.5)))  # the posterior
    >>> lower, upper = vi.evidence_bounds(model, guide, 4)(jax.random.key(0), {"z": 0.7})
    >>> print(f"{lower:.4f} {upper:.4f}")
    -1.5155 -1.5155
    """
    if num_traces < 1:
        raise ValueError(f"evidence_bounds: num_traces must be at least 1, not {num_traces}")

    def bounds(rng_key: Array, exact: Mapping[str, Any], *args: Any) -> tuple[Array, Array]:
        below, above = jax.random.split(rng_key)
        lower = iwae(model, guide, num_traces)(below, *args)
        own = (log_density(model, exact, *args) - log_density(guide, exact, *args)).nats
        if num_traces == 1:
            return lower, own
        among = lambda traces: log_mean_exp(jnp.append(log_weights(model, traces, args), own))
        return lower, expectation(among, guide, num_traces=num_traces - 1)(above, *args)

    return bounds
