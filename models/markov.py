"""A Markov chain over tokens: the smallest language model, which can be enumerated."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from latentrace.models.vocabulary import TableModel, register_table_model
from latentrace.ppl.language_model import Array, Memory


@register_table_model
@dataclass(frozen=True, eq=False)
class MarkovLM(TableModel):
    """Each token depends on the one before it. Logits need not be normalised; -inf is an impossible token."""

    initial: Array
    """Logits float32[V] of the first token: what the start token `vocab_size` is followed by."""
    transition: Array
    """Logits float32[V, V]: row i is what token i is followed by."""
    eos_id: int = field(metadata={"static": True})
    vocabulary: tuple[str, ...] | None = field(default=None, metadata={"static": True})
    """V strings, for `encode` and `decode`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "initial", jnp.asarray(self.initial, jnp.float32))
        object.__setattr__(self, "transition", jnp.asarray(self.transition, jnp.float32))
        object.__setattr__(self, "vocabulary", None if self.vocabulary is None else tuple(self.vocabulary))
        self._check(initial=(self.initial.size,), transition=(self.initial.size, self.initial.size))

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.initial.shape[-1]

    def forward(self, tokens: Array, memory: Memory) -> tuple[Array, Any]:
        """Features [T, V], the next token's logits, and no cache entries: a token is predicted by the last one."""
        del memory
        rows = self.transition[jnp.minimum(tokens, self.vocab_size - 1)]
        return jnp.where((tokens == self.start_id)[:, None], self.initial, rows), ()

    def unembed(self, features: Array) -> Array:
        """Logits float32[T, V]: the features themselves."""
        return features
