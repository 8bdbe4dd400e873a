"""Resample-move: a particle filter whose particles are rewritten, choices of long ago included, as it goes."""

import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from latentrace.ppl import cuts
from latentrace.ppl.errors import SiteError
from latentrace.ppl.run import Settings
from latentrace.ppl.segments import SegmentedRun
from latentrace.ppl.staging import check_repeatable

from ..driver import finish, prepare, wants_progress
from ..mcmc.metropolis import accepts
from ..mcmc.regenerate import log_ratio, random_cuts
from ..posterior import Posterior
from .smc import SMC

Array = jax.Array


@dataclass(frozen=True)
class ResampleMove:
    """SMC with MCMC moves between its steps (Gilks and Berzuini 2001).

    The program is cut after each text at its top level and each step of its top-level loops. At a cut the population may
    resample; then each particle is moved: one of its choices so far is taken uniformly, the program is run again from its
    beginning to the cut, repeating what was chosen before that choice and drawing it and what follows, and the result is
    accepted by the Metropolis-Hastings ratio of `mcmc.Regenerate` for the target at the cut, twists included. At the end the
    particles are moved for the posterior. So early choices, of which resampling leaves few different ones, become many again.

    Particles are moved at every cut, or every `every` cuts, whether the population was resampled or not: moves that depend on
    the weights would make the evidence biased; so it is unbiased on the natural scale, for every threshold.

    A move at cut t runs the program up to there, so all moves together cost as much as T / 2 runs of it for T cuts, and
    repeated texts are decoded again token by token. The ledger counts them.

    Args:
        smc: the population, when it resamples and how.
        num_moves: how often each particle is moved at a cut, at least 1.
        every: move at every so many cuts, and at the end.

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
    >>> smc = inference.SMC(50, ess_threshold=0.9)
    >>> data = jax.numpy.array([0.9, 2.1, 2.8])
    >>> plain, moved = (a.run(jax.random.key(0), walk, data) for a in (smc, inference.ResampleMove(smc, num_moves=2)))
    >>> len(set(moved.values["drift"].tolist())) > len(set(plain.values["drift"].tolist()))
    True
    """

    smc: SMC
    num_moves: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        if self.smc.num_particles < 2:
            raise SiteError(f"ResampleMove: num_particles must be at least 2, not {self.smc.num_particles}")
        for name in ("num_moves", "every"):
            if getattr(self, name) < 1:
                raise SiteError(f"ResampleMove: {name} must be at least 1, not {getattr(self, name)}")

    def run(self, rng_key: jax.Array, program: Any, *args: Any, progress: bool | None = None) -> Posterior:
        """Run on a program; `progress` shows a bar (by default on a terminal or in a notebook, after a few seconds).

        Raises `SiteError` for a program without a random choice.
        """
        start = time.monotonic()
        staged, given = prepare(program, args)
        check_repeatable(staged, given)
        policy = self.smc.policy()
        settings = Settings(self.smc.num_particles, policy=policy, generations=self.smc.generations)
        run_key, move_key = jax.random.split(rng_key)
        run = SegmentedRun(staged, run_key, given, settings)
        if not cuts.random_sites(run):
            raise SiteError("ResampleMove: the program has no random choice to move")
        cut = 0
        with tqdm(desc="generating", unit=" cuts", leave=False, delay=3, disable=not wants_progress(progress)) as bar:
            while not run.done:
                run.advance()
                cut += 1
                if not run.done:
                    cuts.renew(run)
                if run.done or cut % self.every == 0:
                    for number in range(self.num_moves):
                        move(run, jax.random.fold_in(jax.random.fold_in(move_key, cut), number))
                jax.block_until_ready(run.boundary.leaves)
                bar.update()
        output = jax.tree.map(np.asarray, run.output())
        calls = int(output.counts.model_calls.max(initial=0))
        posterior = finish(staged, output, calls=calls, seconds=time.monotonic() - start)
        return replace(posterior, biased=policy.resampler.biased)


def move(run: SegmentedRun, rng_key: Array) -> None:
    """Move each particle of a run that stands at a cut, for the target there."""
    cut_key, run_key, accept_key = jax.random.split(rng_key, 3)
    now = run.output()
    other = cuts.repeated(run, now.values, random_cuts(cut_key, now.made), run_key)
    ratio = log_ratio(cuts.log_rise(run, other), now.made, other.boundary.whole(len(now.made)).state.made)
    cuts.replace(run, other, accepts(accept_key, ratio))
