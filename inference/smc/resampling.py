"""Resampling schemes: from normalised weights to the ancestor of each particle."""

import jax
import jax.numpy as jnp

Array = jax.Array


def systematic(weights: Array, offset: Array) -> Array:
    """Ancestors int32[N] of systematic resampling (Kitagawa 1996; Douc and Cappe 2005, section 2.4).

    Point i is (i + offset) / N on the cumulative weights: particle j has floor or ceil of N w_j offspring. A particle of
    weight 0 has none, whatever rounding does to the cumulative sum.
    """
    n = weights.shape[0]
    # float32 prefix sums need not be monotone, and may rise at a weight of 0: only positive weights may move them up
    cumulative = jax.lax.cummax(jnp.where(weights > 0, jnp.cumsum(weights), 0.0))
    points = (jnp.arange(n) + offset) / n * cumulative[-1]
    ancestors = jnp.searchsorted(cumulative, points, side="right")
    last_alive = n - 1 - jnp.argmax(weights[::-1] > 0)
    return jnp.minimum(ancestors, last_alive).astype(jnp.int32)


SCHEMES = {"systematic": systematic}
