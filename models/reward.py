"""A linear head on a transformer's hidden states: reward models, value models, classifiers."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from latentrace.models.layers import project
from latentrace.models.transformer import TransformerLM
from latentrace.ppl.language_model import Array, empty_memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class RewardModel:
    """A `TransformerLM` whose features a matrix [K, hidden] turns into K numbers per token: a pytree of weights.

    It is a function of token ids, so a program may call it wherever it has some. Its numbers have the scale that it was
    trained for; `ppl.factor` wants nats, so a reward is divided by a temperature there, and a probability turned into its
    logarithm:

        text, context = ppl.generate("answer", context, max_tokens=64)
        ppl.factor("reward", reward(text.tokens, text.length)[0] / temperature)
    """

    trunk: TransformerLM
    kernel: Array

    def values(self, tokens: Any) -> Array:
        """float32[T, K] of a whole sequence int[T]: row t has seen the tokens up to and including t."""
        return _values(self, jnp.asarray(tokens, jnp.int32))

    def __call__(self, tokens: Any, length: Any = None) -> Array:
        """float32[K] of a sequence int[T] of which `length` tokens (default: all) are real, read at the last of them."""
        tokens = jnp.asarray(tokens, jnp.int32)
        last = jnp.maximum((tokens.shape[0] if length is None else length) - 1, 0)
        return self.values(tokens)[last]


@jax.jit
def _values(model: RewardModel, tokens: Array) -> Array:
    features, _ = model.trunk.forward(tokens, empty_memory())
    return project(features, model.kernel)
