"""Scoring many given texts at once."""

from typing import Any

import jax
import jax.numpy as jnp

from latentrace.ppl.language_model import Array, LanguageModel, log_probs_after


def log_probs(lm: LanguageModel, tokens: Any, prompt: Any = ()) -> Array:
    """log p(tokens[n, t] | prompt, tokens[n, :t]) in nats: float32[N, T] of int[N, T], in one pass.

    The texts follow `prompt`, token ids that are computed once for all of them; an empty one stands for the start token.
    Logits exist for a few tokens of each text at a time. Texts of different lengths are padded with any token, and what is
    said of the padding is left out by the caller.

        >>> from latentrace import models
        >>> lm = models.load("reasoner")
        >>> prompt = [lm.start_id, *lm.encode("4 6 8 10\\n")]
        >>> lines = [lm.encode("8-6=2 | 2 4 10"), lm.encode("8-6=3 | 3 4 10")]
        >>> right, wrong = models.log_probs(lm, lines, prompt).sum(axis=1)
        >>> bool(right > wrong)
        True
    """
    ids = jnp.asarray(prompt if len(prompt) else [lm.start_id], jnp.int32)
    return _log_probs(lm, ids, jnp.atleast_2d(jnp.asarray(tokens, jnp.int32)))


_log_probs = jax.jit(log_probs_after)
