"""Sequential Monte Carlo: particles are weighted at every site and inside texts, and resampled when weights degenerate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from latentrace.ppl.choices import Choices
from latentrace.ppl.collectives import PARTICLES, index
from latentrace.ppl.errors import SiteError
from latentrace.ppl.lineage import normalised
from latentrace.ppl.run import Settings

from ..anytime import Budget, Checkpoint, run_in_segments
from ..driver import run_particles
from ..posterior import Posterior
from ..problems import run_many
from .resampling import Resampler, scheme_called
from .triggers import ESSBelow, Trigger

Array = jax.Array

GENERATIONS = 64
"""how many of the latest resamplings a run keeps"""


class Resample(NamedTuple):
    """Resample in one way whenever a trigger says so."""

    when: Trigger
    resampler: Resampler
    inside_texts: bool
    axes: tuple[str, ...] = (PARTICLES,)

    def __call__(self, choices: Choices, clock: Array, chance: Array, log_weight: Array) -> tuple[Array, Array, Array, Choices]:
        weights, total = normalised(log_weight, self.axes[-1])
        n, me = weights.shape[0], index(self.axes[-1])
        due = self.when(chance, weights) & (total > -jnp.inf)
        uniforms, choices = choices.uniforms(clock, weights, 1 if self.resampler.single else n)
        after = self.resampler(weights, uniforms)
        ancestor = jnp.where(due, after.ancestors[me], me)
        # what weights sum to stays the same, in expectation: their mean remains an estimate of the evidence
        return due, ancestor, jnp.where(due, total + jnp.log(after.weights[me]), log_weight), choices


def run_resampled(
    rng_key: jax.Array,
    program: Any,
    args: tuple[Any, ...],
    num_particles: int,
    policy: Resample,
    progress: bool | None,
    budget: Budget | None = None,
    checkpoint: Checkpoint | None = None,
    generations: int = GENERATIONS,
) -> Posterior:
    """Run a population of `num_particles` that resamples by `policy`: in one call, or in segments if it may be stopped."""
    make_settings = lambda staged, report: Settings(num_particles, policy=policy, progress=report, generations=generations)
    if budget is None and checkpoint is None:
        posterior = run_particles(rng_key, program, args, make_settings, total=num_particles, progress=progress)
    else:
        posterior = run_in_segments(
            rng_key, program, args, make_settings, budget=budget, checkpoint=checkpoint, progress=progress
        )
    return replace(posterior, biased=policy.resampler.biased)


def check_granularity(algorithm: str, granularity: str) -> None:
    if granularity not in ("token", "site"):
        raise SiteError(f"{algorithm}: granularity is 'token' or 'site', not {granularity!r}")


@dataclass(frozen=True)
class SMC:
    """Sequential Monte Carlo with resampling when the effective sample size is low (Del Moral, Doucet and Jasra 2006).

    The estimate of the evidence is unbiased on the natural scale for every threshold, every trigger and every way to resample
    but "ceil_residual", whose posteriors are marked `biased`.

    Twists make it the auxiliary particle filter (Pitt and Shephard 1999): particles are resampled by their weight times
    exp(twist), and pay the twist back when the next one replaces it. Where draws come from p(x_t | x_{t-1}, y_t) and the twist
    is the log predictive log p(y_{t+1} | x_t), that is the fully adapted filter, and particles resampled at each step end
    with equal weights.

    Args:
        num_particles: size of the population.
        ess_threshold: resample when ESS < ess_threshold * num_particles; 0 never, above 1 always.
        resample: "systematic", "ssp", "stratified", "residual" or "multinomial", which all leave equal weights; the biased
            "ceil_residual"; or a `Resampler` such as `inference.smc.Tempered(0.5)`.
        granularity: "token" resamples inside texts too, after each token whose weight can move (a constraint, a proposal
            or a twist of its own); "site" only between sites.
        when: a `Trigger` in place of the threshold, such as `inference.smc.EveryK(10)`.
        generations: how many of the latest resamplings `Posterior.genealogy` shows one by one; earlier ones are merged into one
            map. 0 keeps none.

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
    resample: str | Resampler = "systematic"
    granularity: Literal["token", "site"] = "token"
    when: Trigger | None = None
    generations: int = GENERATIONS

    def __post_init__(self) -> None:
        if self.num_particles < 1:
            raise SiteError(f"SMC: num_particles must be at least 1, not {self.num_particles}")
        if self.generations < 0:
            raise SiteError(f"SMC: generations must be at least 0, not {self.generations}")
        check_granularity("SMC", self.granularity)
        self.policy()

    def policy(self) -> Resample:
        """When and how it resamples."""
        resampler = scheme_called(self.resample) if isinstance(self.resample, str) else self.resample
        return Resample(self.when or ESSBelow(self.ess_threshold), resampler, self.granularity == "token")

    def run(
        self,
        rng_key: jax.Array,
        program: Any,
        *args: Any,
        progress: bool | None = None,
        budget: Budget | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Run on a program; `progress` shows a bar (by default on a terminal or in a notebook, after a few seconds).

        With a `budget` or a `checkpoint` the run is cut after each text at the program's top level and each step of its
        top-level loops. There it stops when the budget is spent or at Ctrl-C, and returns the posterior so far (see
        `Posterior.stopped`), and from there a checkpoint goes on. The particles are those of the run in one call.
        """
        return run_resampled(
            rng_key, program, args, self.num_particles, self.policy(), progress, budget, checkpoint, self.generations
        )

    def run_many(
        self,
        rng_key: jax.Array,
        program: Any,
        problems: Sequence[Any],
        *,
        at_once: int = 64,
        return_errors: bool = False,
        progress: bool | None = None,
    ) -> list[Posterior]:
        """Run on each of many problems, side by side in one compiled batch: a population for each, which never mix.

        Problem number p gets the particles of `run(jax.random.fold_in(rng_key, p), program, *problems[p])`, save where the
        larger matrix products round differently. Problems may differ in arrays and in texts of any length (they are padded
        to the longest); options, functions and models are the same for all. The batch goes on segment by segment (see
        `run`): what has finished its loop gives its place to problems that wait.

        Args:
            problems: the arguments of each: a tuple, or the one argument.
            at_once: how many are under way at a time; memory is in proportion.
            return_errors: give the error of a problem that fails (`RunError`, such as all particles dying) in place of its
                posterior, rather than raise the first one in the end.

        After an interrupt (Ctrl-C) problems that have not finished have None. Raises `SiteError` where problems lead to
        different programs.

        >>> import jax, numpyro.distributions as dist
        >>> from latentrace import inference, ppl
        >>> @ppl.program
        ... def scale(ys):
        ...     x = ppl.sample("x", dist.Gamma(2.0, 1.0))
        ...     ppl.observe("y", dist.Normal(0.0, x), ys)
        >>> found = inference.SMC(100).run_many(jax.random.key(0), scale, [jax.numpy.array([y]) for y in (0.1, 1.0, 9.0)])
        >>> [len(posterior.values["x"]) for posterior in found]
        [100, 100, 100]
        """
        policy = self.policy()
        return run_many(
            rng_key,
            program,
            problems,
            Settings(self.num_particles, policy=policy, generations=self.generations),
            at_once=at_once,
            return_errors=return_errors,
            progress=progress,
            finished=lambda posterior: replace(posterior, biased=policy.resampler.biased),
        )
