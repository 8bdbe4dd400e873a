"""A hidden Markov model over tokens; its cache entry is the belief over the hidden state."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from latentrace.models.vocabulary import TableModel, register_table_model
from latentrace.ppl.language_model import Array, Memory


@register_table_model
@dataclass(frozen=True, eq=False)
class HMMLM(TableModel):
    """A hidden state emits each token, then moves. Logits need not be normalised; -inf is an impossible event."""

    initial: Array
    """Logits float32[S] of the state that emits the first token."""
    transition: Array
    """Logits float32[S, S]: row s is where state s moves."""
    emission: Array
    """Logits float32[S, V]: row s is what state s emits."""
    eos_id: int = field(metadata={"static": True})
    vocabulary: tuple[str, ...] | None = field(default=None, metadata={"static": True})
    """V strings, for `encode` and `decode`."""

    def __post_init__(self) -> None:
        for name in ("initial", "transition", "emission"):
            object.__setattr__(self, name, jnp.asarray(getattr(self, name), jnp.float32))
        object.__setattr__(self, "vocabulary", None if self.vocabulary is None else tuple(self.vocabulary))
        states = self.initial.size
        self._check(initial=(states,), transition=(states, states), emission=(states, self.vocab_size))

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.emission.shape[-1]

    def forward(self, tokens: Array, memory: Memory) -> tuple[Array, Array]:
        """Beliefs [T, S] after each token: log-probabilities of the state that emits the next one.

        They are both features and cache entries; the start token leaves the belief as it is.
        """
        initial = log_normalise(self.initial)
        transition, emission = log_normalise(self.transition), log_normalise(self.emission)
        belief = initial if memory.last is None else jnp.where(memory.position > 0, memory.last[0], initial)

        def read(belief: Array, token: Array) -> tuple[Array, Array]:
            evidence = emission[:, jnp.minimum(token, self.vocab_size - 1)]
            updated = log_sum_exp(_condition(belief, evidence)[:, None] + transition, axis=0)
            belief = jnp.where(token == self.start_id, belief, updated)
            return belief, belief

        _, beliefs = jax.lax.scan(read, belief, tokens)
        return beliefs, beliefs

    def unembed(self, features: Array) -> Array:
        """Log-probabilities float32[T, V] of the next token under beliefs [T, S]."""
        return log_sum_exp(features[:, :, None] + log_normalise(self.emission), axis=1)


def _condition(belief: Array, evidence: Array) -> Array:
    """Bayes' rule in logs. An impossible token leaves the belief as it was: any sequel has probability 0 already."""
    joint = belief + evidence
    total = log_sum_exp(joint, axis=-1)
    possible = total > -jnp.inf
    return jnp.where(possible, joint - jnp.where(possible, total, 0.0), belief)


def log_sum_exp(x: Array, axis: int) -> Array:
    """log(sum(exp(x))), with value -inf and gradient 0, not NaN, where all of x is -inf."""
    top = jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    total = jnp.sum(jnp.exp(x - top), axis=axis)
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + jnp.squeeze(top, axis), -jnp.inf)


def log_normalise(x: Array) -> Array:
    """log_softmax over the last axis that leaves a row of only -inf as it is."""
    total = log_sum_exp(x, axis=-1)[..., None]
    return x - jnp.where(total > -jnp.inf, total, 0.0)
