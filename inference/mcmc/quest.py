"""QUEST: the published Metropolis-Hastings sampler of rewarded texts."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from latentrace.ppl.errors import SiteError
from latentrace.ppl.walk import Walk

from .regenerate import Regenerate

Array = jax.Array


@dataclass(frozen=True)
class Quest(Regenerate):
    """Suffix moves with the acceptance of QUEST's code (Faria et al. 2024; deep-spin/quest-decoding), for its figures.

    For a text with `ppl.factor("reward", r / beta)`, beta being 0.1 there, a suffix from the model after a uniform cut is
    accepted with probability min(1, exp(clip((r' - r) / beta)) |y| / |y'|), |y| being the tokens of the text, its end included.
    That is `Regenerate` but for the clip, to 20 nats either way (a cut that is taken whatever the length does the same as the
    ratio of lengths): a text of reward 0 is accepted now and then, and where rewards differ by more the limit is not the
    posterior. Its texts end at the horizon as ours do, so lengths add no bias.

    Args:
        clip: nats.

    >>> import jax, jax.numpy as jnp
    >>> from latentrace import inference, models, ppl
    >>> lm = models.MarkovLM(jnp.array([0.0, 1.0, 0.5]), jnp.zeros((3, 3)), eos_id=0)
    >>> @ppl.program
    ... def rewarded():
    ...     text, _ = ppl.generate("text", ppl.prompt(lm), max_tokens=4)
    ...     ppl.factor("reward", 0.2 * (text.tokens == 2).sum() / 0.1)
    >>> chains = inference.MCMC(inference.mcmc.Quest(), num_samples=30, num_chains=2)
    >>> chains.run(jax.random.key(0), rewarded).values["text"].tokens.shape
    (60, 4)
    """

    clip: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clip > 0:
            raise SiteError(f"Quest: clip must be positive, not {self.clip}")
        if self.tries != 1 or self.cuts != "uniform":
            raise SiteError("Quest: the published sampler has uniform cuts and one try")

    def log_ratio(self, walk: Walk, other: Walk, exact: Array) -> Array:
        # a text that cannot be drawn is none, but one of reward 0 is clipped like any other
        return jnp.clip(self.power * (other.log_weight - walk.log_weight), -self.clip, self.clip)
