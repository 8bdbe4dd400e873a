"""Importance sampling: independent particles from the program's proposals, weighted by target over proposal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from latentrace.ppl.errors import SiteError
from latentrace.ppl.run import Settings

from .driver import run_particles
from .posterior import Posterior
from .problems import run_many


@dataclass(frozen=True)
class ImportanceSampling:
    """Self-normalised importance sampling.

    Args:
        num_particles: how many traces to draw.
        batch_size: how many to run at once; less memory, and the same draws.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import inference, ppl
    >>> @ppl.program
    ... def coin():
    ...     bias = ppl.sample("bias", dist.Beta(2.0, 1.0))
    ...     ppl.observe("heads", dist.Bernoulli(bias), 1)
    >>> posterior = inference.ImportanceSampling(1000).run(jax.random.key(0), coin)
    >>> abs(posterior.expectation("bias") - 0.75) < 0.02
    np.True_
    """

    num_particles: int
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_particles", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SiteError(f"ImportanceSampling: {name} must be at least 1, not {value}")

    def run(self, rng_key: jax.Array, program: Any, *args: Any, progress: bool | None = None) -> Posterior:
        """Run on a program; `progress` shows a bar (by default on a terminal or in a notebook, after a few seconds)."""
        size = min(self.batch_size or self.num_particles, self.num_particles)
        return run_particles(
            rng_key,
            program,
            args,
            lambda staged, report: Settings(size, progress=report),
            total=self.num_particles,
            progress=progress,
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
        """Run on each of many problems, side by side in one compiled batch: see `SMC.run_many`. `batch_size` plays no part."""
        settings = Settings(self.num_particles)
        return run_many(rng_key, program, problems, settings, at_once=at_once, return_errors=return_errors, progress=progress)
