"""Particle Gibbs: Markov chains over traces, whose moves are sweeps of conditional SMC."""

from dataclasses import dataclass
from typing import Any, Literal

import jax

from latentrace.ppl.errors import SiteError, near_misses

from ..mcmc.mcmc import MCMC
from ..mcmc.proposals import ValueProposal
from ..posterior import Posterior
from .ancestor_sampling import AncestorSampling
from .conditional import CONDITIONAL_SCHEMES, ConditionalSMC
from .smc import check_granularity


@dataclass(frozen=True)
class ParticleGibbs:
    """Particle Gibbs (Andrieu, Doucet and Holenstein 2010): a Markov chain whose moves are conditional SMC sweeps.

    Each sweep runs a population in which one particle repeats the chain's trace, and draws the next trace from it: the
    posterior stays invariant for any number of particles from 2 on.

    Args:
        num_particles: size of the population, at least 2.
        num_samples: draws of each chain, after `num_warmup` steps that are not kept.
        parameters: a proposal for `sample` sites, such as `inference.mcmc.RandomWalk(theta=0.3)`: each step moves those by
            Metropolis-Hastings with the rest fixed, then the rest by conditional SMC given them. Without it everything
            is moved together (iterated conditional SMC).
        ess_threshold: resample when ESS < ess_threshold * num_particles.
        resample: "multinomial" or "systematic", each in its conditional form.
        granularity: "token" resamples inside texts too, "site" only between sites.
        ancestor_sampling: at each resampling the trace that is repeated draws whose past it goes on from (Lindsten, Jordan and
            Schon 2014), so that early values move as often as late ones even where particles are few. It takes "multinomial"
            resampling, and happens at the program's top level only: before draws that follow a weight, and before the steps
            of loops, never inside texts, inner loops or branches, whatever `granularity` says. Each resampling walks what is
            left of the program once for every particle, one pass through the language model for each text: over T steps that
            is up to T (T - 1) / 2 passes more than the T x tokens of the sweep. Programs with `ppl.nested` are refused.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> @ppl.program
    ... def walk(ys):
    ...     def step(x, y):
    ...         x = ppl.sample("x", dist.Normal(x, 1.0))
    ...         ppl.observe("y", dist.Normal(x, 0.5), y)
    ...         return x, x
    ...     return jax.lax.scan(step, 0.0, ys)[1]
    >>> posterior = inference.ParticleGibbs(10, num_samples=50).run(jax.random.key(0), walk, jax.numpy.array([0.1, 0.5, 1.2]))
    >>> posterior.values["x"].shape
    (50, 3)
    """

    num_particles: int
    num_samples: int
    parameters: ValueProposal | None = None
    num_warmup: int = 0
    num_chains: int = 1
    ess_threshold: float = 0.5
    resample: str = "multinomial"
    granularity: Literal["token", "site"] = "token"
    ancestor_sampling: bool = False

    def __post_init__(self) -> None:
        if self.num_particles < 2:
            raise SiteError(
                f"ParticleGibbs: num_particles must be at least 2, as one repeats the trace; not {self.num_particles}"
            )
        check_granularity("ParticleGibbs", self.granularity)
        if self.resample not in CONDITIONAL_SCHEMES:
            raise SiteError(
                f"ParticleGibbs: no conditional resampling {self.resample!r}; {near_misses(self.resample, CONDITIONAL_SCHEMES)}"
            )
        if self.ancestor_sampling and self.resample != "multinomial":
            raise SiteError(
                f"ParticleGibbs: ancestor sampling draws ancestors independently, and {self.resample!r} resampling does not; "
                "take resample='multinomial'"
            )

    def run(self, rng_key: jax.Array, program: Any, *args: Any, progress: bool | None = None) -> Posterior:
        """Run on a program; `progress` shows a bar (by default on a terminal or in a notebook, after a few seconds)."""
        inside_texts = self.granularity == "token"
        kernel_of = AncestorSampling if self.ancestor_sampling else ConditionalSMC
        kernel = kernel_of(self.num_particles, self.ess_threshold, self.resample, inside_texts, self.parameters)
        chains = MCMC(kernel, self.num_samples, self.num_warmup, self.num_chains)
        return chains.run(rng_key, program, *args, progress=progress)
