"""Fitting a hidden Markov model to texts: how a language model is distilled into one that `lookahead` can sum over."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentrace.models.hmm import HMMLM, log_normalise, log_sum_exp

Array = jax.Array
TINY = 1e-37
Logits = tuple[Array, Array, Array]
"""initial float32[S], transition float32[S, S], emission float32[S, V], as log probabilities"""


def fit_hmm(
    rng_key: Array,
    tokens: Any,
    lengths: Any,
    num_states: int,
    *,
    vocab_size: int,
    eos_id: int,
    num_steps: int = 50,
    pseudo_count: float = 0.01,
    vocabulary: tuple[str, ...] | None = None,
) -> HMMLM:
    """The hidden Markov model of `num_states` states under which texts are most probable, by expectation maximisation (Baum,
    Petrie, Soules and Weiss 1970), from random numbers.

    Draws from a language model, as many as can be had, distil it: the twist of `ppl.constraints.lookahead` is then close to
    what the language model itself would foresee (Zhang, Kung and Van den Broeck 2023).

    Args:
        tokens: int[N, T], texts; EOS at the end of one is a token like others.
        lengths: int[N], tokens of each, EOS included.
        num_steps: passes over all texts.
        pseudo_count: added to each expected count of an emission and a move, so that nothing is impossible.
        vocabulary: V strings of the model, if it is to spell.

    >>> import jax
    >>> hmm = fit_hmm(jax.random.key(0), [[1, 2, 1, 2, 0], [2, 1, 2, 1, 0]], [5, 5], 3, vocab_size=3, eos_id=0)
    >>> hmm.emission.shape
    (3, 3)
    """
    tokens, lengths = np.asarray(tokens), np.asarray(lengths)
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
        raise ValueError(f"fit_hmm: expected tokens [N, T] and lengths [N], found {tokens.shape} and {lengths.shape}")
    if num_states < 1 or tokens.size == 0 or not pseudo_count >= 0:
        raise ValueError("fit_hmm: there must be a state and a token at least, and pseudo_count must not be negative")
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    if (wrong := tokens[inside & ((tokens < 0) | (tokens >= vocab_size))]).size:
        raise ValueError(f"fit_hmm: token id {wrong[0]} is outside the vocabulary of {vocab_size} tokens")
    shapes = (num_states,), (num_states, num_states), (num_states, vocab_size)
    p = tuple(log_normalise(jax.random.normal(k, s)) for k, s in zip(jax.random.split(rng_key, 3), shapes))
    for _ in range(num_steps):
        p = improved(p, jnp.asarray(np.where(inside, tokens, 0)), jnp.asarray(inside), pseudo_count)
    return HMMLM(*p, eos_id=eos_id, vocabulary=vocabulary)


def log_likelihood(p: Logits, tokens: Array, inside: Array) -> Array:
    """Log probability float32[] of texts int32[N, T], of which the tokens that are `inside` count; nats."""
    initial, transition, emission = p

    def of_one(tokens: Array, inside: Array) -> Array:
        def read(belief: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
            token, counts = at
            joint = belief + emission[:, token]
            top = jax.lax.stop_gradient(joint.max())
            after = jnp.log(jnp.maximum(jnp.exp(joint - top) @ jnp.exp(transition), TINY)) + top
            return jnp.where(counts, after, belief), None

        # a move after the last token changes nothing: its probabilities sum to 1
        return log_sum_exp(jax.lax.scan(read, initial, (tokens, inside))[0], axis=0)

    return jax.vmap(of_one)(tokens, inside).sum()


@partial(jax.jit, static_argnames="pseudo_count")
def improved(p: Logits, tokens: Array, inside: Array, pseudo_count: float) -> Logits:
    """One step: parameters in proportion to how often each is used, in expectation given the texts. These counts are the
    gradient of the log likelihood by the log parameters (Salakhutdinov, Roweis and Ghahramani 2003)."""
    counts = jax.grad(log_likelihood)(p, tokens, inside)
    return jax.tree.map(lambda count: log_normalise(jnp.log(count + pseudo_count)), counts)  # type: ignore[no-any-return]
