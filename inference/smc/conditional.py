"""Conditional SMC and particle Gibbs: a population in which one particle repeats the chain's trace."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl.errors import SiteError, near_misses
from latentrace.ppl.run import Output, RetainingSource, Settings

from ..chains import Draw, Info, Target, added, draw_of, info_of, run_chains
from ..mcmc.metropolis import Metropolis
from ..mcmc.proposals import ValueProposal
from ..posterior import Posterior
from .resampling import SCHEMES, Scheme, at_points
from .smc import Resample, check_granularity
from .triggers import ESSBelow

Array = jax.Array


def multinomial(weights: Array, uniforms: Array) -> Array:
    """Ancestors int32[N]: 0 of place 0, and independent ones of the others (Andrieu, Doucet and Holenstein 2010, 4.3)."""
    return at_points(weights, uniforms).at[0].set(0)


def systematic(weights: Array, uniforms: Array) -> Array:
    """Ancestors int32[N] by systematic resampling, given that place 0 has ancestor 0 (Chopin and Singh 2015, algorithm 4).

    With N w_0 = f + r, place 0 has f + 1 offspring for u < r and f otherwise. Given that one of them is ours, the density of
    u is in proportion to their number.
    """
    n = weights.shape[0]
    expected = jnp.maximum(n * weights[0], 1e-30)
    whole = jnp.floor(expected)
    rest = expected - whole
    more = rest * (whole + 1) / expected  # probability of f + 1
    v = uniforms[0]
    u = jnp.where(v < more, v * expected / (whole + 1), rest + (v - more) * expected / jnp.maximum(whole, 1))
    return at_points(weights, (jnp.arange(n) + u) / n).at[0].set(0)


CONDITIONAL_SCHEMES = {"multinomial": Scheme(multinomial), "systematic": Scheme(systematic, single=True)}


class GibbsState(NamedTuple):
    draw: Draw


@dataclass(frozen=True)
class ConditionalSMC:
    """The kernel of iterated conditional SMC and of particle Gibbs."""

    num_particles: int
    ess_threshold: float = 0.5
    scheme: str = "multinomial"
    inside_texts: bool = True
    parameters: ValueProposal | None = None

    @property
    def repeats(self) -> bool:
        return True

    @property
    def sites(self) -> tuple[str, ...]:
        return () if self.parameters is None else self.parameters.sites

    def init(self, target: Target, rng_key: Array) -> tuple[GibbsState, Info]:
        """A trace of plain SMC."""
        run_key, pick_key = jax.random.split(rng_key)
        policy = Resample(ESSBelow(self.ess_threshold), SCHEMES[self.scheme], self.inside_texts)
        output = target.population(run_key, Settings(self.num_particles, policy=policy))
        found = (output.log_weight > -jnp.inf).any().astype(jnp.float32)
        return GibbsState(pick(output, pick_key)[0]), info_of(output, found)

    def step(self, target: Target, rng_key: Array, state: GibbsState) -> tuple[GibbsState, Info]:
        """Move the parameters given the rest, then everything else given the parameters."""
        run_key, pick_key, move_key = jax.random.split(rng_key, 3)
        draw, info = state.draw, None
        if self.parameters is not None:
            draw, info = Metropolis(self.parameters).move(target, move_key, draw)
        values = target.choices(draw)
        policy = Resample(ESSBelow(self.ess_threshold), CONDITIONAL_SCHEMES[self.scheme], self.inside_texts)
        output = target.population(
            run_key,
            Settings(self.num_particles, RetainingSource(), policy),
            {name: values.pop(name) for name in self.sites},
            trace=values,
        )
        draw, which = pick(output, pick_key)
        renewed = info_of(output, (which != 0).astype(jnp.float32))
        return GibbsState(draw), renewed if info is None else added(info, renewed)


def pick(output: Output, rng_key: Array) -> tuple[Draw, Array]:
    """A particle drawn by weight, and its number."""
    which = jax.random.categorical(rng_key, output.log_weight)
    return draw_of(output, which), which


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

    def run(self, rng_key: jax.Array, program: Any, *args: Any, progress: bool | None = None) -> Posterior:
        """Run on a program; `progress` shows a bar (by default on a terminal or in a notebook, after a few seconds)."""
        inside_texts = self.granularity == "token"
        kernel = ConditionalSMC(self.num_particles, self.ess_threshold, self.resample, inside_texts, self.parameters)
        return run_chains(
            rng_key,
            program,
            args,
            kernel,
            num_samples=self.num_samples,
            num_warmup=self.num_warmup,
            num_chains=self.num_chains,
            progress=progress,
        )
