"""Rollouts: groups of texts that a policy writes after prompts, their rewards, and their log-probabilities as it learns."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latentrace import ppl
from latentrace.ppl.errors import SiteError
from latentrace.ppl.language_model import LanguageModel, log_probs_after
from latentrace.ppl.text import PAD, given_tokens

from ..importance import ImportanceSampling
from ..posterior import readable
from .policies import is_mixed

Array = jax.Array
Prompt = str | Sequence[int]


class Rollouts(NamedTuple):
    """G texts for each of B prompts: arrays with a leading axis of prompts, hence data of `learning.fit`."""

    prompts: Array
    """int32[B, P]: token ids, padded at the end with -1"""
    tokens: Array
    """int32[B, G, T]: token ids, padded with EOS"""
    mask: Array
    """bool[B, G, T]: which of them were written, the one that ended the text included"""
    ended: Array
    """bool[B, G]: False where a text was cut at T tokens"""
    log_probs: Array
    """float32[B, G, T], nats: of each token under the model that wrote it; 0 outside of `mask`"""
    rewards: Array
    """float32[B, G]"""

    @property
    def lengths(self) -> Array:
        """int32[B, G]: tokens of each text."""
        return self.mask.sum(-1).astype(jnp.int32)


@ppl.program
def write(lm: LanguageModel, prompt: Array, max_tokens: int, until: str | None, traced_reward: Any) -> Any:
    """A text after a prompt, and its reward where that is a traced function."""
    text, _ = ppl.generate("text", ppl.prompt(lm, prompt), max_tokens=max_tokens, until=until)
    return text, jnp.float32(0) if traced_reward is None else jnp.asarray(traced_reward(prompt, text), jnp.float32)


def rollouts(
    rng_key: Array,
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    reward: Callable[[Any, Any], Any],
    *,
    group_size: int,
    max_tokens: int,
    until: str | None = None,
    traced: bool = False,
    pad_to: int = 0,
    at_once: int = 64,
) -> Rollouts:
    """Let a policy write `group_size` texts after each of some prompts, at temperature 1, and reward them.

    All of them are drawn by one compiled call (for every `at_once` prompts). Weights, prompts and keys are its inputs: another
    call of the same sizes compiles nothing.

    Args:
        lm: the policy.
        prompts: texts or token ids. They are padded to the bucket of the longest; `pad_to` puts those of all calls into one.
        reward: `reward(prompt, text)`, a number: called on the host with a prompt as it was given and the text as a string, or
            as a tuple of token ids where the model knows no strings. With `traced`, a JAX function of int32[P], padded with -1,
            and a `ppl.Text`, evaluated as a part of the compiled call.
        group_size: texts per prompt, G.
        max_tokens: tokens of the longest text, T.
        until: a string that ends a text, besides EOS.

    Raises SiteError where there is no prompt, a prompt does not fit, or a reward is not a finite number.

    >>> import jax
    >>> from latentrace import models
    >>> from latentrace.inference import learning
    >>> lm = models.load("reasoner")
    >>> found = learning.rollouts(jax.random.key(0), lm, ["4 6 8 10\\n", "3 5 7\\n"], lambda prompt, text: "=24" in text,
    ...                           group_size=4, max_tokens=8)
    >>> found.tokens.shape, found.rewards.shape
    ((2, 4, 8), (2, 4))
    """
    if not len(prompts):
        raise SiteError("rollouts: `prompts` is empty; give at least one text or list of token ids")
    padded = _padded(lm, prompts, pad_to)
    problems = [(lm, prompt, max_tokens, until, reward if traced else None) for prompt in padded]
    found = ImportanceSampling(group_size).run_many(rng_key, write, problems, at_once=at_once, progress=False)
    texts = [posterior.returned[0] for posterior in found]
    if traced:
        rewards = np.stack([posterior.returned[1] for posterior in found])
    else:
        judge = lambda prompt, text: [float(reward(prompt, one)) for one in readable(text)]
        rewards = np.array([judge(prompt, text) for prompt, text in zip(prompts, texts)], np.float32)
    if not np.isfinite(rewards).all():
        where = np.argwhere(~np.isfinite(rewards))[0]
        raise SiteError(f"rollouts: the reward of text {where[1]} of prompt {where[0]} is {rewards[tuple(where)]}, not finite")
    stacked = lambda name: jnp.asarray(np.stack([getattr(text, name) for text in texts]))
    tokens, mask = stacked("tokens"), jnp.arange(max_tokens) < stacked("length")[..., None]
    return Rollouts(jnp.asarray(padded), tokens, mask, stacked("ended"), stacked("log_probs"), jnp.asarray(rewards))


def _padded(lm: LanguageModel, prompts: Sequence[Prompt], pad_to: int) -> Array:
    """int32[B, P] of prompts; an empty one is the start token."""
    rows = [given_tokens(lm, prompt, "prompt", start=True, pad_to=pad_to) for prompt in prompts]
    width = max(len(row) for row in rows)
    table = np.stack([np.pad(row, (0, width - len(row)), constant_values=PAD) for row in rows])
    table[:, 0] = np.where((table < 0).all(axis=1), lm.start_id, table[:, 0])
    return jnp.asarray(table)


def log_probs(lm: LanguageModel, batch: Rollouts) -> Array:
    """log p of every token of rollouts under a model, given what precedes it: float32[B, G, T], nats, 0 outside of the mask.

    One forward pass, teacher-forced; a prompt is read once for its group. Differentiable in the weights of `lm`, and for use in
    a compiled loss.
    """
    found = jax.vmap(lambda prompt, texts: log_probs_after(lm, prompt, texts))(batch.prompts, batch.tokens)
    return jnp.where(batch.mask, found, 0.0)


class Refilled(NamedTuple):
    """Groups of mixed rewards, and what it took to find them."""

    rollouts: Rollouts
    groups: int
    """groups drawn"""
    tokens: int
    """tokens written in all of them"""


def mixed_rollouts(rng_key: Array, draw: Callable[[Array, int], Rollouts], num_groups: int, *, max_draws: int = 10) -> Refilled:
    """Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): drop groups whose rewards are all equal, and draw until there are
    `num_groups` of others.

    `draw(rng_key, number)` is a call of `rollouts` on the host, the number-th one, for which it may take other prompts. The
    prompts that remain are no longer distributed as `draw` chooses them: one whose texts are right with probability P counts
    in proportion to 1 - P^G - (1 - P)^G. What is dropped has no advantages, so that expected gradients keep their direction.

    Raises SiteError after `max_draws` draws.

    >>> import jax
    >>> from latentrace import models
    >>> from latentrace.inference import learning
    >>> lm, prompts = models.load("reasoner"), ["4 6 8 10\\n", "3 5 7\\n"]
    >>> begins = lambda prompt, text: float(text[0] == prompt[0])
    >>> draw = lambda rng_key, number: learning.rollouts(rng_key, lm, prompts, begins, group_size=4, max_tokens=8)
    >>> found = learning.mixed_rollouts(jax.random.key(0), draw, num_groups=3)
    >>> found.rollouts.rewards.shape, found.groups >= 3
    ((3, 4), True)
    """
    kept: list[Rollouts] = []
    groups = tokens = have = 0
    for number in range(max_draws):
        drawn = draw(jax.random.fold_in(rng_key, number), number)
        mixed = np.asarray(is_mixed(drawn.rewards))
        groups, tokens, have = groups + len(mixed), tokens + int(drawn.mask.sum()), have + int(mixed.sum())
        kept.append(jax.tree.map(lambda x: np.asarray(x)[mixed], drawn))
        if have >= num_groups:
            joined = jax.tree.map(lambda *xs: jnp.asarray(np.concatenate(xs)[:num_groups]), *kept)
            return Refilled(joined, groups, tokens)
    raise SiteError(
        f"mixed_rollouts: {have} of {groups} groups have rewards that differ, {num_groups} are wanted, and "
        f"max_draws={max_draws} is reached; take prompts that are neither hopeless nor solved, or larger groups"
    )
