"""A deliberately imperfect verifier, for the study of inference against verifiers that err at a known rate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class ImperfectVerifier(NamedTuple):
    """Errs on a fixed random set of texts: asked twice about one text, it says the same.

    >>> import jax.numpy as jnp
    >>> verifier = ImperfectVerifier(completeness=0.9, soundness=0.8)
    >>> verdict = verifier.accepts(jnp.asarray(True), jnp.array([12, 7, 14]), 3)
    """

    completeness: Array | float
    """probability that a right text is accepted"""
    soundness: Array | float
    """probability that a wrong text is rejected"""
    seed: int = 0
    """which texts it errs on"""

    def accepts(self, right: Array, tokens: Array, length: Array | int) -> Array:
        """bool[]: its verdict on `tokens[:length]` (int32[T]), of which an exact verifier says whether it is `right`."""
        inside = jnp.arange(tokens.shape[0]) < length

        def mix(key: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
            token, is_inside = item
            return jnp.where(is_inside, jax.random.fold_in(key, token), key), None

        key, _ = jax.lax.scan(mix, jax.random.key(self.seed), (tokens, inside))
        u = jax.random.uniform(key)
        return jnp.where(right, u < self.completeness, u >= self.soundness)
