"""Small models, and an oracle that enumerates programs written in plain Python."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latentrace import models
from latentrace.models.transformer import Transformer, TransformerConfig, TransformerLM
from latentrace.ppl.language_model import empty_memory

LETTERS = "abcdefgh"


def markov(vocab_size: int, *, eos_id: int = 0, seed: int = 0) -> models.MarkovLM:
    """A Markov chain with uneven random logits, whose tokens spell a, b, c, ..."""
    rng = np.random.default_rng(seed)
    initial, transition = rng.normal(size=vocab_size), rng.normal(size=(vocab_size, vocab_size))
    return models.MarkovLM(initial, transition, eos_id, vocabulary=tuple(LETTERS[:vocab_size]))


def hmm(states: int, vocab_size: int, *, eos_id: int = 0, seed: int = 0) -> models.HMMLM:
    """A hidden Markov model with uneven random logits: its next token depends on the whole context."""
    rng = np.random.default_rng(seed)
    shapes = (states,), (states, states), (states, vocab_size)
    return models.HMMLM(*(1.5 * rng.normal(size=s) for s in shapes), eos_id, vocabulary=tuple(LETTERS[:vocab_size]))


@cache
def next_probs(lm: Any, tokens: tuple[int, ...] = ()) -> np.ndarray:
    """float64[V]: the model's next-token probabilities after `tokens`, by one pass over the whole sequence."""
    ids = np.asarray([lm.start_id, *tokens] if not tokens or isinstance(lm, models.HMMLM) else tokens, np.int32)
    logits = np.asarray(lm.logits(ids), np.float64)[-1]
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class Path:
    """One path through a program written in plain Python; `paths` visits all of them."""

    def __init__(self, prefix: tuple[int, ...]):
        self.prefix, self.taken, self.radices, self.density = prefix, [], [], 1.0

    def choose(self, probs: Any) -> int:
        """One of len(probs) outcomes."""
        k = self.prefix[len(self.taken)] if len(self.taken) < len(self.prefix) else 0
        self.taken.append(k)
        self.radices.append(len(probs))
        self.density *= float(probs[k])
        return k

    def flip(self, p: float) -> int:
        return self.choose([1 - p, p])

    def weigh(self, weight: Any) -> None:
        """Multiply the density: a factor by exp(log weight), a condition by whether it holds."""
        self.density *= float(weight)

    def text(self, lm: Any, context: tuple, max_tokens: int, stop: Any = None, support: Any = None) -> tuple[int, ...]:
        """A text after `context`. `stop(tokens)` says that `until` is met, `support(probs)` which tokens are proposed."""
        text: tuple[int, ...] = ()
        while len(text) < max_tokens:
            probs = next_probs(lm, context + text)
            text += (self.choose(probs if support is None else np.where(support(probs), probs, 0.0)),)
            if text[-1] == lm.eos_id or (stop is not None and stop(text)):
                break
        return text


def paths(fn: Callable[[Path], Any]):
    """Result and unnormalised density of every path of a program written in plain Python."""
    todo: list[tuple[int, ...]] = [()]
    while todo:
        prefix = todo.pop()
        path = Path(prefix)
        result = fn(path)
        yield result, path.density
        for i in range(len(prefix), len(path.taken)):
            todo += [(*path.taken[:i], k) for k in range(1, path.radices[i])]


def measure(pairs: Any) -> dict[Any, float]:
    """Densities summed over equal results; results of density 0 left out."""
    found: dict[Any, float] = {}
    for result, density in pairs:
        key = tuple(np.asarray(result).ravel().tolist())
        if density > 0:
            found[key] = found.get(key, 0.0) + float(density)
    return found


def padded(text: tuple[int, ...], max_tokens: int, eos_id: int = 0) -> tuple[int, ...]:
    return (*text, *[eos_id] * (max_tokens - len(text)))


WIDTH = 256


class DigitModel:
    """What models of one array have in common that write the digits 0, 1 and 2."""

    vocab_size, adds_start = 3, False

    def __init__(self, weights: Any):
        self.weights = weights

    def tree_flatten(self):
        return (self.weights,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)

    def encode(self, text):
        return [int(c) for c in text]

    def decode(self, ids):
        return "".join(map(str, ids))

    def token_bytes(self):
        return [b"0", b"1", b"2"]


@jax.tree_util.register_pytree_node_class
class WideCacheModel(DigitModel):
    """A model whose cache takes far more memory than the model: it predicts from the mean of all cached vectors."""

    eos_id, start_id, max_length = 0, 0, 10_000

    def forward(self, tokens, memory):
        entries = self.weights[tokens]
        before = sum((jnp.where(b.mask[:, None], b.entries, 0.0).sum(0) for b in memory.blocks), jnp.zeros(WIDTH))
        return before + jnp.cumsum(entries, axis=0), entries

    def unembed(self, features):
        return features @ self.weights.T

    def logits(self, tokens):
        return self.unembed(self.forward(jnp.asarray(tokens), empty_memory())[0])


def wide_cache_model() -> WideCacheModel:
    return WideCacheModel(jnp.asarray(0.05 * np.random.default_rng(0).normal(size=(3, WIDTH)), jnp.float32))


def attentive_model(scale: float) -> Any:
    """A small transformer of 11 tokens, EOS 0, whose next token depends on all that it has read: its weights are `scale` times
    the random ones."""
    config = TransformerConfig(vocab_size=11, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=2,
                               head_dim=8, max_length=64, eos_id=0, bos_id=1, tied=False)  # fmt: skip
    lm = TransformerLM.from_module(Transformer(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: scale * x if x.ndim > 1 else x, lm)
