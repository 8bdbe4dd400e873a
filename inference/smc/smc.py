"""Sequential Monte Carlo: particles are weighted at every site and inside texts, and resampled when weights degenerate."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl import collectives
from latentrace.ppl.choices import Choices
from latentrace.ppl.errors import SiteError, near_misses
from latentrace.ppl.run import Settings

from ..driver import run_particles
from ..posterior import Posterior
from .resampling import SCHEMES

Array = jax.Array


class ResampleBelow(NamedTuple):
    """Resample when the effective sample size falls below `threshold` times the number of particles."""

    threshold: float
    scheme: str
    inside_texts: bool

    def __call__(self, choices: Choices, clock: Array, log_weight: Array) -> tuple[Array, Array, Array, Choices]:
        n, me = collectives.size(), collectives.index()
        log_weights = collectives.gather(log_weight)
        total = jax.nn.logsumexp(log_weights)
        alive = total > -jnp.inf
        weights = jnp.where(alive, jnp.exp(log_weights - jnp.where(alive, total, 0.0)), 1 / n)
        ess = 1 / (weights**2).sum()
        due = (ess < self.threshold * n) & alive
        scheme = SCHEMES[self.scheme]
        uniforms, choices = choices.uniforms(clock, weights, 1 if scheme.single else n)
        ancestor = jnp.where(due, scheme.ancestors(weights, uniforms)[me], me)
        # everybody gets the mean weight, so the mean of weights stays an estimate of the evidence
        return due, ancestor, jnp.where(due, total - jnp.log(n), log_weight), choices


@dataclass(frozen=True)
class SMC:
    """Sequential Monte Carlo with resampling when the effective sample size is low (Del Moral, Doucet and Jasra 2006).

    The estimate of the evidence is unbiased on the natural scale for every threshold.

    Args:
        num_particles: size of the population.
        ess_threshold: resample when ESS < ess_threshold * num_particles; 0 never, above 1 always.
        resample: "systematic", "ssp", "stratified", "residual" or "multinomial" (`latentrace.inference.smc.resampling`).
        granularity: "token" resamples inside texts too, after each token whose weight can move (a constraint, a proposal
            or a twist of its own); "site" only between sites.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> @ppl.program
    ... def walk(ys):
    ...     def step(x, y):
    ...         x = ppl.sample("x", dist.Normal(x, 1.0))
    ...         ppl.observe("y", dist.Normal(x, 0.5), y)
    ...         return x, x
    ...     return jax.lax.scan(step, 0.0, ys)[1]
    >>> posterior = inference.SMC(200).run(jax.random.key(0), walk, jax.numpy.array([0.1, 0.5, 1.2]))
    >>> posterior.values["x"].shape
    (200, 3)
    """

    num_particles: int
    ess_threshold: float = 0.5
    resample: str = "systematic"
    granularity: Literal["token", "site"] = "token"

    def __post_init__(self) -> None:
        if self.num_particles < 1:
            raise SiteError(f"SMC: num_particles must be at least 1, not {self.num_particles}")
        if self.resample not in SCHEMES:
            raise SiteError(f"SMC: no resampling scheme {self.resample!r}; {near_misses(self.resample, SCHEMES)}")
        if self.granularity not in ("token", "site"):
            raise SiteError(f"SMC: granularity is 'token' or 'site', not {self.granularity!r}")

    def run(self, rng_key: jax.Array, program: Any, *args: Any, progress: bool | None = None) -> Posterior:
        """Run on a program; `progress` shows a bar (by default on a terminal or in a notebook, after a few seconds)."""
        policy = ResampleBelow(self.ess_threshold, self.resample, self.granularity == "token")
        return run_particles(
            rng_key,
            program,
            args,
            lambda staged, report: Settings(self.num_particles, policy=policy, progress=report),
            total=self.num_particles,
            progress=progress,
        )
