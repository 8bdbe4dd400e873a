"""Waste-free sequential Monte Carlo: every state that a move passes through is a particle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl.choices import Choices, Keyed
from latentrace.ppl.errors import SiteError

from ..chains import Info, PopulationKernel, Target
from ..posterior import Posterior
from .ladder import Population, check_temperatures, climb
from .resampling import at_points
from .tempering import REGENERATE, moved

Array = jax.Array


class Chains(NamedTuple):
    """Resample some ancestors, and make of each a chain of `length` traces, its own first: all of them are the population."""

    num_particles: int
    length: int
    kernel: PopulationKernel
    at_the_end: bool = False

    @property
    def num_moving(self) -> int:
        return self.num_particles // self.length

    def renew(self, target: Target, rng_key: Array, population: Population, power: Array) -> tuple[Population, Array, Info]:
        resample_key, move_key = jax.random.split(rng_key)
        first = ancestors(population, self.num_moving, Keyed(resample_key, jnp.int32(0)))
        _, each, info = moved(self.kernel, target, move_key, first.traces, power, self.length - 1)
        join = lambda x, xs: jnp.concatenate([x, xs.reshape(-1, *xs.shape[2:])])
        traces = jax.tree.map(join, first.traces, each)
        repeat = lambda x: jnp.tile(x, self.length)
        return Population(traces, repeat(first.log_weights), repeat(first.roots)), jnp.asarray(True), info


def ancestors(population: Population, count: int, choices: Choices) -> Population:
    """`count` of the population, drawn by weight (systematically), each with the mean weight."""
    total = jax.nn.logsumexp(population.log_weights)
    weights = jnp.exp(population.log_weights - total)
    uniforms, _ = choices.uniforms(jnp.int32(0), weights, 1)
    chosen = at_points(weights, (jnp.arange(count) + uniforms[0]) / count)
    traces, roots = jax.tree.map(lambda x: x[chosen], (population.traces, population.roots))
    return Population(traces, jnp.full(count, total - jnp.log(weights.shape[0])), roots)


@dataclass(frozen=True)
class WasteFreeSMC:
    """Waste-free SMC (Dau and Chopin 2022, algorithm 2) over the temperatures of `TemperedSMC`.

    For each temperature M = num_particles / chain_length ancestors are drawn by weight, each is moved chain_length - 1 times
    by a kernel that leaves the temperature's target invariant, and all M * chain_length traces along the way, the ancestors
    included, are weighted for the next temperature. Where `TemperedSMC` throws away all but the last of several moves, nothing
    is wasted here: long chains of few ancestors do well (the paper recommends M much smaller than N).

    The posterior is the population as weighted for power 1, as in the paper. The estimate of the evidence is unbiased on the
    natural scale; temperatures, pilot run and `posterior.ladder` are those of `TemperedSMC`.

    Args:
        num_particles: size N of the population, a multiple of `chain_length`.
        chain_length: traces of each chain, at least 2.
        kernel: how traces are moved; a `PopulationKernel`. One move of `Regenerate` costs as much as a forward run.
        temperatures: increasing powers of W, the last 1; None to find them in a pilot run, as `TemperedSMC` does.
        ess_threshold: the conditional effective sample size of temperatures to find, as a part of the population.

    >>> import jax
    >>> from latentrace import inference, models, ppl
    >>> lm = models.MarkovLM([0.0, 0.5, 1.0], [[0.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.5, 1.0]], eos_id=0)
    >>> @ppl.program
    ... def sharp():
    ...     text, _ = ppl.generate("text", ppl.prompt(lm), max_tokens=6)
    ...     ppl.factor("power", 3 * text.log_probs.sum())  # p^4
    >>> posterior = inference.WasteFreeSMC(128, chain_length=16, temperatures=(0.2, 0.5, 1.0)).run(jax.random.key(0), sharp)
    >>> len(posterior.weights)
    128
    """

    num_particles: int
    chain_length: int
    kernel: PopulationKernel = REGENERATE
    temperatures: Sequence[float] | None = None
    ess_threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.num_particles < 2:
            raise SiteError(f"WasteFreeSMC: num_particles must be at least 2, not {self.num_particles}")
        if self.chain_length < 2:
            raise SiteError(
                f"WasteFreeSMC: chain_length must be at least 2, not {self.chain_length}; a chain of one is never moved"
            )
        if self.num_particles % self.chain_length:
            raise SiteError(
                f"WasteFreeSMC: num_particles must be a multiple of chain_length={self.chain_length}, not {self.num_particles}"
            )
        check_temperatures("WasteFreeSMC", self.temperatures, self.ess_threshold)

    def run(self, rng_key: jax.Array, program: Any, *args: Any, progress: bool | None = None) -> Posterior:
        """Run on a program; `progress` and errors are as for `TemperedSMC`."""
        return climb(
            "WasteFreeSMC",
            rng_key,
            program,
            args,
            Chains(self.num_particles, self.chain_length, self.kernel),
            temperatures=self.temperatures,
            ess_threshold=self.ess_threshold,
            progress=progress,
        )
