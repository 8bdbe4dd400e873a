"""Two-sided bounds on log evidence: forward SMC from below, conditional SMC around an exact trace from above."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latentrace.ppl.errors import SiteError, SiteNameError, near_misses
from latentrace.ppl.run import RetainingSource, Settings, arrays_of, check_faults, compiled, given_arrays
from latentrace.ppl.staging import check_repeatable

from ..chains import Target
from ..driver import prepare
from .conditional import CONDITIONAL_SCHEMES
from .smc import SMC

Array = jax.Array


class Bounds(NamedTuple):
    """Estimates of the two bounds, nats: log evidence lies between their expectations."""

    lower: float
    """mean of log Z_hat over runs of SMC"""
    lower_error: float
    """its standard error"""
    upper: float
    """mean of log Z_hat over runs of conditional SMC"""
    upper_error: float

    @property
    def gap(self) -> float:
        """upper - lower: at least the sum of both KL divergences between sampler and posterior (Grosse et al. 2015)."""
        return self.upper - self.lower


def evidence_bounds(rng_key: Array, program: Any, *args: Any, trace: Mapping[str, Any], smc: SMC, num_runs: int = 32) -> Bounds:
    """Bounds on the log evidence of a program, given one exact draw from its posterior.

    E[log Z_hat] <= log Z for plain SMC, whose Z_hat is unbiased. E[log Z_hat] >= log Z for SMC in which one particle repeats
    an exact posterior draw: there E[1 / Z_hat] <= 1 / Z, with equality where particles cannot all die (bidirectional Monte
    Carlo: Grosse, Ghahramani and Adams 2015; Cusumano-Towner and Mansinghka 2017, algorithm 2). An exact draw is at hand
    where the data is simulated: the latent values that it was simulated with. With a trace from somewhere else the upper
    bound need not hold.

    Args:
        trace: a value for every random site that is not given; texts as strings, token ids or `Text`s.
        smc: with resampling "multinomial" or "systematic", of which there is a conditional form, and a threshold.
        num_runs: how often each of the two runs.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> @ppl.program
    ... def walk():
    ...     def step(x, _):
    ...         x = ppl.sample("x", dist.Normal(x, 1.0))
    ...         return x, ppl.sample("y", dist.Normal(x, 0.5))
    ...     return jax.lax.scan(step, 0.0, None, length=4)[1]
    >>> simulated = walk.simulate(jax.random.key(0)).values
    >>> program = walk.condition({"y": simulated["y"]})
    >>> bounds = evidence_bounds(jax.random.key(1), program, trace={"x": simulated["x"]}, smc=inference.SMC(200))
    >>> bounds.lower - 3 * bounds.lower_error < bounds.upper + 3 * bounds.upper_error
    True
    """
    scheme = smc.resample if isinstance(smc.resample, str) else type(smc.resample).__name__
    if scheme not in CONDITIONAL_SCHEMES:
        raise SiteError(f"evidence_bounds: no conditional form of resampling {scheme!r}; take 'multinomial' or 'systematic'")
    staged, given = prepare(program, args)
    check_repeatable(staged, given)
    values, arrays, skeleton = given_arrays(staged, given), arrays_of(staged), staged.skeleton()
    random = Target(skeleton, arrays, values).random
    for name in {*random, *trace}:
        if name not in random:
            raise SiteNameError(f"no random site {name!r} to repeat: {near_misses(name, random)}")
        if name not in trace:
            raise SiteError(f"evidence_bounds: the trace has no value for site {name!r}; every random site needs one")
    policy = smc.policy()
    conditional = policy._replace(resampler=CONDITIONAL_SCHEMES[scheme])
    forward = Settings(smc.num_particles, policy=policy)
    backward = Settings(smc.num_particles, RetainingSource(), conditional)

    def log_evidences(settings: Settings, trace: dict[str, Array], key: Array) -> list[float]:
        run = lambda arrays, values, trace, key: Target(skeleton, arrays, values).population(key, settings, trace=trace)
        call = compiled((staged.key(), settings, tuple(sorted(values)), tuple(sorted(trace))), lambda: run)
        found = []
        for run_key in jax.random.split(key, num_runs):
            output = jax.device_get(call(arrays, values, trace, run_key))
            check_faults(staged, output.faults, np.zeros(1))  # a run in which all die bounds from below by -inf
            found.append(float(jax.nn.logsumexp(output.log_weight) - jnp.log(smc.num_particles)))
        return found

    keys = jax.random.split(rng_key)
    below = log_evidences(forward, {}, keys[0])
    above = log_evidences(backward, given_arrays(staged, trace), keys[1])
    return Bounds(float(np.mean(below)), _standard_error(below), float(np.mean(above)), _standard_error(above))


def _standard_error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("inf")
