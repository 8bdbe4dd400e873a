"""What a language model is to this library: a pytree of weights with a causal forward pass over cached tokens.

Anything with the members of `LanguageModel` can be prompted, generated from and scored. Three kinds ship in
`latentrace.models`; `MarkovLM` there is the shortest complete example.
"""

from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

Array = jax.Array


class Block(NamedTuple):
    """A run of cached tokens, shared by several contexts or owned by one particle."""

    entries: Any
    """What `LanguageModel.forward` returned for these tokens: a pytree whose leaves have the slot axis at -2."""
    mask: Array
    """bool[slots]: the slots that belong to this context."""


class Memory(NamedTuple):
    """Everything that precedes the new tokens of a forward pass."""

    blocks: tuple[Block, ...]
    position: Array
    """int32[]: how many tokens precede the first new one."""
    last: Any
    """The entries of the most recent cached token (slot axis of size 1); zeros where `position` is 0."""


def empty_memory() -> Memory:
    """The memory before the first token."""
    return Memory((), jnp.int32(0), None)


@runtime_checkable
class LanguageModel(Protocol):
    """A causal model of token sequences. The object itself is a pytree: leaves are weights, the rest is static."""

    vocab_size: int
    """Number of tokens V; the rows of logits have this length."""
    eos_id: int
    """The token that ends a text."""
    start_id: int
    """The token that an empty prompt starts from (may equal `vocab_size`, a token that is never generated)."""
    adds_start: bool
    """Whether the start token precedes a prompt given as text (as in Llama's tokenizers, not in GPT-2's)."""
    max_length: int
    """The most tokens, start token included, that one context may hold."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without a start token."""
        ...

    def decode(self, ids: Any) -> str:
        """The text of token ids; start and end tokens are left out."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The exact bytes that each token adds to a text, b"" for special tokens; length V."""
        ...

    def forward(self, tokens: Array, memory: Memory) -> tuple[Array, Any]:
        """Features [T, D] of `tokens` (int32[T]) after `memory`, and their cache entries (slot axis -2, size T).

        Token t sees all of `memory` and the new tokens up to itself.
        """
        ...

    def unembed(self, features: Array) -> Array:
        """Logits float32[T, V] of the token after each row of features [T, D]."""
        ...

    def logits(self, tokens: Any) -> Array:
        """Logits float32[T, V] of a whole sequence int[T]; row t predicts token t + 1."""
        ...


def feature_size(lm: LanguageModel) -> int:
    """D: how many features `forward` gives for a token."""
    leaves, tree = jax.tree.flatten(lm)
    return _feature_size(tree, tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves))


@lru_cache(maxsize=64)
def _feature_size(tree: Any, leaves: tuple[Any, ...]) -> int:
    features = lambda weights, token: tree.unflatten(weights).forward(token, empty_memory())[0]
    return int(jax.eval_shape(features, leaves, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[-1])


def token_log_probs(lm: LanguageModel, features: Array, tokens: Array) -> Array:
    """log p(tokens[t]) after features[t], in nats: float32[T] of features [T, D] and int32[T].

    Logits exist for `CHUNK` tokens at a time, never for all.
    """

    def one(row: tuple[Array, Array]) -> Array:
        logits = lm.unembed(row[0][None])[0]
        return logits[row[1]] - jax.nn.logsumexp(logits)

    # a gradient computes each chunk's logits again rather than keep those of all
    return jax.lax.map(jax.checkpoint(one, prevent_cse=False), (features, tokens), batch_size=min(CHUNK, tokens.shape[0]))


def log_probs_after(lm: LanguageModel, prompt: Array, texts: Array) -> Array:
    """log p(texts[n, t] | prompt, texts[n, :t]) in nats: float32[N, T] of int32[P] and int32[N, T]. Differentiable in weights.

    The prompt, one token at least, may be padded at its end with negative ids; it is read once for all texts.
    """
    known = (prompt >= 0).sum().astype(jnp.int32) - 1  # all of it but its last token, which is fed with each text
    ids, memory = jnp.maximum(prompt, 0), empty_memory()
    if len(ids) > 1:
        entries = lm.forward(ids[:-1], memory)[1]
        latest = lambda x: jax.lax.dynamic_slice_in_dim(x, jnp.maximum(known - 1, 0), 1, axis=-2)
        last = jax.tree.map(lambda x: jnp.where(known > 0, latest(x), 0), entries)
        memory = Memory((Block(entries, jnp.arange(len(ids) - 1) < known),), known, last)

    def one(text: Array) -> Array:
        features, _ = lm.forward(jnp.concatenate([ids[known][None], text[:-1]]), memory)
        return token_log_probs(lm, features, text)

    return jax.vmap(one)(texts)


CHUNK = 16
"""Tokens of one text whose logits are in memory together."""
