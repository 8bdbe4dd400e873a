"""Conditional SMC: a population in which one particle repeats the chain's trace."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from latentrace.ppl.choices import at_points
from latentrace.ppl.run import Output, RetainingSource, Settings
from latentrace.ppl.staging import check_repeatable

from ..chains import Draw, Info, Kernel, State, Target, added, draw_of, info_of
from ..mcmc.metropolis import Metropolis
from ..mcmc.proposals import ValueProposal
from .resampling import SCHEMES, Scheme
from .smc import Resample
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


@dataclass(frozen=True)
class ConditionalSMC(Kernel):
    """The kernel of iterated conditional SMC and of particle Gibbs (see `inference.ParticleGibbs`).

    >>> from latentrace.inference.mcmc import ConditionalSMC
    >>> ConditionalSMC(num_particles=8).num_particles
    8
    """

    num_particles: int = 16
    ess_threshold: float = 0.5
    scheme: str = "multinomial"
    inside_texts: bool = True
    parameters: ValueProposal | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        return () if self.parameters is None else self.parameters.sites

    def check(self, target: Target) -> None:
        check_repeatable(target.staged, target.given)

    def start(self, target: Target, rng_key: Array, values: Mapping[str, Array]) -> tuple[Draw, Info]:
        """A trace of plain SMC."""
        run_key, pick_key = jax.random.split(rng_key)
        policy = Resample(ESSBelow(self.ess_threshold), SCHEMES[self.scheme], self.inside_texts)
        output = target.population(run_key, Settings(self.num_particles, policy=policy), values)
        found = (output.log_weight > -jnp.inf).any().astype(jnp.float32)
        return pick(output, pick_key)[0], info_of(output, found)

    def init(self, target: Target, rng_key: Array, draw: Draw) -> State:
        return State(draw)

    def step(self, target: Target, rng_key: Array, state: State) -> tuple[State, Info]:
        """Move the parameters given the rest, then everything else given the parameters."""
        run_key, pick_key, move_key = jax.random.split(rng_key, 3)
        draw, info = state.draw, None
        if self.parameters is not None:
            draw, info = Metropolis(self.parameters).move(target, move_key, draw)
        policy = Resample(ESSBelow(self.ess_threshold), CONDITIONAL_SCHEMES[self.scheme], self.inside_texts)
        output = self.population(target, run_key, draw, policy)
        draw, which = pick(output, pick_key)
        renewed = info_of(output, ((which != 0) | (output.root[0] != 0)).astype(jnp.float32))
        return State(draw), renewed if info is None else added(info, renewed)

    def population(self, target: Target, rng_key: Array, draw: Draw, policy: Resample) -> Output:
        """A population in which particle 0 repeats a trace, but for the parameters, which all have from there."""
        values = target.choices(draw)
        settings = Settings(self.num_particles, RetainingSource(), policy)
        return target.population(rng_key, settings, {name: values.pop(name) for name in self.sites}, trace=values)


def pick(output: Output, rng_key: Array) -> tuple[Draw, Array]:
    """A particle drawn by weight, and its number."""
    which = jax.random.categorical(rng_key, output.log_weight)
    return draw_of(output, which), which
