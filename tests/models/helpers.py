"""What the tests of language models share: small models, and decoding with a cache by hand."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from latentrace import models
from latentrace.ppl.language_model import Block, Memory, empty_memory

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
GOLDEN = Path(__file__).resolve().parent / "golden"


def shared(path: str) -> Path:
    """A reference file or folder beside the checkout; the test skips where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"reference data ../shared/data/{path} is not beside this checkout")
    return SHARED / path


def markov(vocab_size: int = 5) -> models.MarkovLM:
    rng = np.random.default_rng(0)
    return models.MarkovLM(rng.normal(size=vocab_size), rng.normal(size=(vocab_size, vocab_size)), eos_id=1)


def hmm(states: int = 3, vocab_size: int = 5) -> models.HMMLM:
    rng = np.random.default_rng(1)
    sizes = [(states,), (states, states), (states, vocab_size)]
    return models.HMMLM(*(rng.normal(size=size) for size in sizes), eos_id=1)


def config(**changes) -> models.TransformerConfig:
    """A transformer of 2 layers, 4 heads over 2 key-value heads, 11 tokens."""
    settings = dict(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
        max_length=64, eos_id=1, bos_id=0,
    )  # fmt: skip
    return models.TransformerConfig(**(settings | changes))


@cache
def transformer(**changes) -> models.TransformerLM:
    """A random transformer with weights large enough for attention to matter."""
    module = models.Transformer(config(**changes), rngs=nnx.Rngs(0))
    lm = models.TransformerLM.from_module(module)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), lm)


def write(cache, entry, slot):
    """The cache with one token's entry put into a slot."""
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, slot, axis=-2), cache, entry)


def logits_in_two_blocks(lm, tokens, cut: int, capacity: int):
    """Logits of tokens[cut:], read one by one after a shared block tokens[:cut] and an own block with unused slots."""
    _, prompt = lm.forward(tokens[:cut], empty_memory())
    last = jax.tree.map(lambda x: x[..., -1:, :], prompt)
    garbage = jax.tree.map(lambda x: jnp.full((*x.shape[:-2], capacity, x.shape[-1]), 7.0), prompt)
    slots = jnp.arange(capacity)

    def step(carry, token):
        own, last, used = carry
        shared_block = Block(prompt, jnp.ones(cut, bool))
        own_block = Block(own, (slots % 2 == 0) & (slots < 2 * used))  # every other slot is left out
        features, entry = lm.forward(token[None], Memory((shared_block, own_block), cut + used, last))
        own = write(own, entry, 2 * used)
        return (own, entry, used + 1), lm.unembed(features)[0]

    _, logits = jax.lax.scan(step, (garbage, last, jnp.int32(0)), tokens[cut:])
    return logits
