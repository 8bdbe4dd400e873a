"""Particle marginal Metropolis-Hastings: parameters move by Metropolis-Hastings, with SMC's estimate of their likelihood."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl.errors import SiteError
from latentrace.ppl.run import Settings

from ..chains import Draw, Info, Kernel, Target, draw_of, info_of
from ..mcmc.mcmc import MCMC
from ..mcmc.metropolis import accepts
from ..mcmc.proposals import ValueProposal
from ..posterior import Posterior
from .smc import SMC

Array = jax.Array


class MarginalState(NamedTuple):
    draw: Draw
    log_evidence: Array
    """float32[]: the estimate, for the parameters of `draw`, that was accepted with them; nats"""


@dataclass(frozen=True)
class MarginalMetropolis(Kernel):
    """The kernel of PMMH (see `inference.PMMH`).

    >>> from latentrace import inference
    >>> from latentrace.inference.mcmc import MarginalMetropolis, RandomWalk
    >>> MarginalMetropolis(inference.SMC(20), RandomWalk(drift=0.5)).sites
    ('drift',)
    """

    smc: SMC
    parameters: ValueProposal

    @property
    def num_particles(self) -> int:
        return self.smc.num_particles

    @property
    def sites(self) -> tuple[str, ...]:
        return self.parameters.sites

    def start(self, target: Target, rng_key: Array, values: Mapping[str, Array]) -> tuple[Draw, Info]:
        """A trace of plain SMC over the whole program."""
        run_key, pick_key = jax.random.split(rng_key)
        output = target.population(run_key, self._settings, values)
        found = (output.log_weight > -jnp.inf).any().astype(jnp.float32)
        return draw_of(output, jax.random.categorical(pick_key, output.log_weight)), info_of(output, found)

    def init(self, target: Target, rng_key: Array, draw: Draw) -> MarginalState:
        """The trace's parameters, and an estimate of their evidence."""
        values = target.choices(draw)
        return self._estimate(target, rng_key, {name: values[name] for name in self.parameters.sites})[0]

    def at(self, target: Target, state: MarginalState, draw: Draw) -> MarginalState:
        raise SiteError(
            "PMMH keeps an estimate of the evidence with its parameters, which other kernels cannot move: run it alone, or "
            "take ConditionalSMC in its place"
        )

    def step(self, target: Target, rng_key: Array, state: MarginalState) -> tuple[MarginalState, Info]:
        """Propose parameters; accept them and a trace of theirs by the ratio of estimated evidences."""
        propose_key, run_key, accept_key = jax.random.split(rng_key, 3)
        values = target.choices(state.draw)
        moved, log_ratio = self.parameters.propose(propose_key, {name: values[name] for name in self.parameters.sites})
        proposed, info = self._estimate(target, run_key, moved)
        accept = accepts(accept_key, proposed.log_evidence - state.log_evidence + log_ratio)
        after = jax.tree.map(lambda then, now: jnp.where(accept, then, now), proposed, state)
        return after, info._replace(accepted=accept.astype(jnp.float32))

    def _estimate(self, target: Target, rng_key: Array, parameters: dict[str, Array]) -> tuple[MarginalState, Info]:
        """A trace given the parameters, and the estimate of their joint evidence, prior included."""
        run_key, pick_key = jax.random.split(rng_key)
        output = target.population(run_key, self._settings, parameters)
        log_evidence = jax.nn.logsumexp(output.log_weight) - jnp.log(self.num_particles)
        draw = draw_of(output, jax.random.categorical(pick_key, output.log_weight))
        return MarginalState(draw, log_evidence), info_of(output, jnp.float32(1))

    @property
    def _settings(self) -> Settings:
        return Settings(self.num_particles, policy=self.smc.policy())


@dataclass(frozen=True)
class PMMH:
    """Particle marginal Metropolis-Hastings (Andrieu, Doucet and Holenstein 2010, section 2.4.2).

    Its stationary distribution is the exact posterior of parameters and trace, for any number of particles: the estimates of
    the evidence are unbiased, and each is kept for as long as its parameters are.

    Args:
        parameters: a proposal for `sample` sites, such as `inference.mcmc.RandomWalk(theta=0.3)`.
        smc: the SMC that runs given the parameters; its evidence should vary little (a variance of log evidence of about 1
            to 3 nats is best: Doucet, Pitt, Deligiannidis and Kohn 2015).
        num_samples: draws of each chain, after `num_warmup` steps that are not kept.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> @ppl.program
    ... def walk(ys):
    ...     drift = ppl.sample("drift", dist.Normal(0.0, 1.0))
    ...     def step(x, y):
    ...         x = ppl.sample("x", dist.Normal(x + drift, 1.0))
    ...         ppl.observe("y", dist.Normal(x, 0.5), y)
    ...         return x, x
    ...     return jax.lax.scan(step, 0.0, ys)[1]
    >>> algorithm = inference.PMMH(inference.mcmc.RandomWalk(drift=0.5), inference.SMC(20), num_samples=50)
    >>> algorithm.run(jax.random.key(0), walk, jax.numpy.array([0.1, 0.5, 1.2])).values["drift"].shape
    (50,)
    """

    parameters: ValueProposal
    smc: SMC
    num_samples: int
    num_warmup: int = 0
    num_chains: int = 1

    def __post_init__(self) -> None:
        if self.smc.policy().resampler.biased:
            raise SiteError(f"PMMH: resampling by {self.smc.resample!r} is biased, and the chain would be; take 'systematic'")

    def run(self, rng_key: jax.Array, program: Any, *args: Any, progress: bool | None = None) -> Posterior:
        """Run on a program; `progress` shows a bar (by default on a terminal or in a notebook, after a few seconds)."""
        chains = MCMC(MarginalMetropolis(self.smc, self.parameters), self.num_samples, self.num_warmup, self.num_chains)
        return chains.run(rng_key, program, *args, progress=progress)
