"""SMC steering: every particle is continued in several ways, and the best of all continuations are kept."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from latentrace.ppl.errors import SiteError

from ..posterior import Posterior
from .resampling import Resampled, optimal, repeated
from .smc import Resample, check_granularity, run_resampled
from .triggers import EACH_TIME, Trigger

Array = jax.Array


@dataclass(frozen=True)
class Branching:
    """Of M particles keep M / branches without replacement, and copy each `branches` times, to share its weight.

    Where fewer have a positive weight, all of these are kept, and their copies fill the population as evenly as they can. With
    one branch nobody is ever chosen: it only fills the places of dead particles.

    >>> after = Branching(2)(jnp.array([0.1, 0.6, 0.1, 0.2]), jnp.array([0.3]))
    >>> after.ancestors.tolist(), after.weights.tolist()
    ([1, 1, 2, 2], [0.30000001192092896, 0.30000001192092896, 0.20000000298023224, 0.20000000298023224])
    """

    branches: int
    single: ClassVar[bool] = True
    biased: ClassVar[bool] = False

    def __call__(self, weights: Array, uniforms: Array) -> Resampled:
        m = weights.shape[0]
        survives, after = optimal(weights, m // self.branches, uniforms)
        survivors, rank = survives.sum(), jnp.cumsum(survives) - 1
        copies = jnp.where(survives, m // survivors + (rank < m % survivors), 0)
        ancestors = repeated(copies)
        return Resampled(ancestors, after[ancestors] / copies[ancestors])


@dataclass(frozen=True)
class SMCSteering:
    """Sequential Monte Carlo steering (Lew, Zhi-Xuan, Grand and Mansinghka 2023, algorithm 1).

    Each of `num_particles` particles is continued `branches` times; of all these candidates as many as there are particles
    survive, chosen without replacement so that the variance of weights is least (Fearnhead and Clifford 2003): heavy ones
    keep their weight, light ones stand for each other. It is a beam search whose weights are proper: the estimate of the
    evidence is unbiased on the natural scale.

    The population is that of the candidates: num_particles * branches traces, which start independently. Where weights have
    moved and a draw follows, survivors are chosen and copied. The posterior holds all candidates.

    In the paper a particle that has finished is not continued. Here a trace that draws nothing more, as after the end of its
    text, is copied with the others, and its copies are candidates of their own: weights stay proper, but where many texts end
    early there are fewer different ones among the candidates than there could be.

    Args:
        num_particles: how many candidates survive.
        branches: how often each survivor is continued.
        granularity: "token" chooses inside texts too, after each token whose weight can move; "site" only between sites.
        when: the `Trigger` of a choice; by default each time that weights have moved.

    >>> import jax
    >>> from latentrace import inference, models, ppl
    >>> lm = models.MarkovLM([0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]], eos_id=0)
    >>> @ppl.program
    ... def ones():
    ...     text, _ = ppl.generate("text", ppl.prompt(lm), max_tokens=5, twist=lambda text: (text.tokens == 1).sum())
    ...     ppl.condition("all ones", (text.tokens == 1).all())
    >>> posterior = inference.SMCSteering(8, branches=3).run(jax.random.key(0), ones)
    >>> len(posterior.weights)
    24
    """

    num_particles: int
    branches: int
    granularity: Literal["token", "site"] = "token"
    when: Trigger = EACH_TIME

    def __post_init__(self) -> None:
        if self.num_particles < 1:
            raise SiteError(f"SMCSteering: num_particles must be at least 1, not {self.num_particles}")
        if self.branches < 2:
            raise SiteError(
                f"SMCSteering: branches must be at least 2, not {self.branches}; with one continuation each nobody is chosen"
            )
        check_granularity("SMCSteering", self.granularity)

    def run(self, rng_key: jax.Array, program: Any, *args: Any, progress: bool | None = None) -> Posterior:
        """Run on a program; `progress` shows a bar (by default on a terminal or in a notebook, after a few seconds)."""
        policy = Resample(self.when, Branching(self.branches), self.granularity == "token")
        return run_resampled(rng_key, program, args, self.num_particles * self.branches, policy, progress)
