"""Tempered sequential Monte Carlo: whole traces go from the program's proposal to its posterior by powers of their weight."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl.choices import Keyed
from latentrace.ppl.errors import SiteError

from ..chains import Info, PopulationKernel, Target, Traces
from ..mcmc.regenerate import Regenerate
from ..posterior import Posterior
from .ladder import Population, check_temperatures, climb, resampled
from .resampling import Resampler, scheme_called
from .smc import Resample
from .triggers import ESSBelow

Array = jax.Array

REGENERATE = Regenerate()


class ResampleAndMove(NamedTuple):
    """Resample where that is due, then move each trace some times."""

    num_particles: int
    policy: Resample
    kernel: PopulationKernel
    num_moves: int
    at_the_end: bool = True

    @property
    def num_moving(self) -> int:
        return self.num_particles

    def renew(self, target: Target, rng_key: Array, population: Population, power: Array) -> tuple[Population, Array, Info]:
        resample_key, move_key = jax.random.split(rng_key)
        population, due = resampled(population, self.policy, Keyed(resample_key, jnp.int32(0)))
        traces, _, info = moved(self.kernel, target, move_key, population.traces, power, self.num_moves)
        return population._replace(traces=traces), due, info


def moved(
    kernel: PopulationKernel, target: Target, rng_key: Array, traces: Traces, power: Array, times: int
) -> tuple[Traces, Traces, Info]:
    """Traces after `times` moves of each, after each of these (leading axis), and what all moves say together."""

    def move(traces: Traces, key: Array) -> tuple[Traces, tuple[Traces, Info]]:
        after, info = kernel.move(target, key, traces, power)
        return after, (after, info)

    last, (each, infos) = jax.lax.scan(move, traces, jax.random.split(rng_key, times))
    faults = jax.tree.map(lambda x: x.max(axis=0), infos.faults)
    return last, each, Info(infos.accepted.mean(), faults, jax.tree.map(lambda x: x.sum(axis=0), infos.counts))


@dataclass(frozen=True)
class TemperedSMC:
    """A sequential Monte Carlo sampler of whole traces (Del Moral, Doucet and Jasra 2006; annealing: Neal 2001).

    With q the density of a forward run and W the target over q, the population follows q W^power from power 0, which plain
    sampling draws from, to power 1, the posterior. At each power particles are weighted by W^(rise of the power), resampled
    when their effective sample size is low, and each is moved by a Markov kernel that leaves q W^power invariant. The kernel
    rewrites whole traces, so what early choices have lost to resampling is won back, and a reward that is given at the end
    alone can steer: `SMC` follows a trace as it is written, this follows complete ones.

    A program with `ppl.factor("power", (alpha - 1) * text.log_probs.sum())` goes from p to p^alpha, one with a reward tempers
    the reward. Conditions are hard at every power above 0, so some of the first traces must meet them.

    Temperatures that depend on the run's own particles would make the evidence biased. So by default a pilot run with a key
    of its own finds them, and the run itself follows them: the estimate of the evidence is unbiased on the natural scale, and
    the run costs twice as much. `posterior.ladder` shows them with effective sample sizes and acceptance, and
    `temperatures=posterior.ladder.temperatures` saves the pilot of the next run. The ledger has the cost of both.

    Args:
        num_particles: size of the population, at least 2.
        kernel: how traces are moved; a `PopulationKernel`.
        num_moves: moves of each particle at each temperature. One of `Regenerate` costs as much as a forward run.
        temperatures: increasing powers of W, the last 1; None to find them, each the highest at which the conditional
            effective sample size is `ess_threshold` of the population, by bisection (Jasra, Stephens, Doucet and Tsagaris 2011;
            Zhou, Johansen and Aston 2016).
        ess_threshold: resample when ESS < ess_threshold * num_particles.
        resample: as in `SMC`.

    >>> import jax
    >>> from latentrace import inference, models, ppl
    >>> lm = models.MarkovLM([0.0, 0.5, 1.0], [[0.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.5, 1.0]], eos_id=0)
    >>> @ppl.program
    ... def sharp():
    ...     text, _ = ppl.generate("text", ppl.prompt(lm), max_tokens=6)
    ...     ppl.factor("power", 3 * text.log_probs.sum())  # p^4
    >>> posterior = inference.TemperedSMC(64, num_moves=2).run(jax.random.key(0), sharp)
    >>> posterior.ladder.temperatures[-1]
    1.0
    """

    num_particles: int
    kernel: PopulationKernel = REGENERATE
    num_moves: int = 1
    temperatures: Sequence[float] | None = None
    ess_threshold: float = 0.5
    resample: str | Resampler = "systematic"

    def __post_init__(self) -> None:
        if self.num_particles < 2:
            raise SiteError(f"TemperedSMC: num_particles must be at least 2, not {self.num_particles}")
        if self.num_moves < 1:
            raise SiteError(f"TemperedSMC: num_moves must be at least 1, not {self.num_moves}")
        check_temperatures("TemperedSMC", self.temperatures, self.ess_threshold)
        self._renewal()

    def _renewal(self) -> ResampleAndMove:
        resampler = scheme_called(self.resample) if isinstance(self.resample, str) else self.resample
        policy = Resample(ESSBelow(self.ess_threshold), resampler, inside_texts=False)
        return ResampleAndMove(self.num_particles, policy, self.kernel, self.num_moves)

    def run(self, rng_key: jax.Array, program: Any, *args: Any, progress: bool | None = None) -> Posterior:
        """Run on a program; `progress` shows a bar (by default on a terminal or in a notebook, after a few seconds).

        Raises `SiteError` for a program without a random choice, `AllParticlesDeadError` where no forward run meets the
        program's conditions, and `RunError` where a pilot run finds no end of temperatures.
        """
        renewal = self._renewal()
        posterior = climb(
            "TemperedSMC",
            rng_key,
            program,
            args,
            renewal,
            temperatures=self.temperatures,
            ess_threshold=self.ess_threshold,
            progress=progress,
        )
        return replace(posterior, biased=renewal.policy.resampler.biased)
