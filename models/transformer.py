"""A decoder-only transformer of the Llama family, and the language model made of one.

One sequence at a time, after a `Memory` of cached blocks; batches are `jax.vmap` of that. A block shared by the whole
batch stays unbatched under `vmap`, so that attention over it is one matrix product for all particles.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latentrace.models.rotary import RopeScaling, rotary_angles, rotate
from latentrace.models.tokenizer import Tokenizer
from latentrace.ppl.language_model import Array, Block, Memory, empty_memory

MASKED = -1e30
"""Score of a slot that may not be seen: finite, so that a block without visible slots gives no NaN."""
FEW_TOKENS = 16
"""Up to this many new tokens a forward pass counts as decoding, not as prefill or training."""


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and constants of a `Transformer`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    eos_id: int
    bos_id: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = True
    """Whether the output head is the embedding matrix."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions need an even one")


def project(x: Array, matrix: Array) -> Array:
    """Rows [T, inputs] times a matrix [outputs, inputs], giving [T, outputs].

    With few tokens per sequence the matrix goes first: XLA's CPU product of a large matrix and few columns, which is
    what `vmap` over particles makes of it, runs 1.4 times as fast as few rows and a large matrix.
    """
    if x.shape[0] > FEW_TOKENS:
        return x @ matrix.T
    return (matrix @ x.T).T


class Linear(nnx.Module):
    """A matrix product and an optional bias, the kernel laid out [outputs, inputs] as in checkpoints."""

    def __init__(self, inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), (outputs, inputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: Array) -> Array:
        product = project(x, self.kernel[...])
        return product if self.bias is None else product + self.bias[...]


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last axis, times a learnt scale."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.scale[...]


def attend(query: Array, key: Array, value: Array, blocks: tuple[Block, ...]) -> Array:
    """Attention of new tokens over cached blocks and over themselves, causally.

    `query` [kv_heads, group, T, head_dim], `key` and `value` [kv_heads, T, head_dim]; each block's entries are its
    (keys, values). Scores are concatenated, never keys: under `vmap` that would copy a shared block per particle.
    """
    length = query.shape[-2]
    query = query * query.shape[-1] ** -0.5
    scores = [jnp.where(block.mask, _scores(query, block.entries[0]), MASKED) for block in blocks]
    causal = np.tril(np.ones((length, length), bool))
    scores.append(jnp.where(causal, _scores(query, key), MASKED))
    values = [block.entries[1] for block in blocks] + [value]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    bounds = np.cumsum([v.shape[-2] for v in values])[:-1]
    parts = jnp.split(weights, bounds, axis=-1)
    mixed = [jnp.einsum("kgts,ksd->kgtd", part, v) for part, v in zip(parts, values)]
    return sum(mixed[1:], mixed[0])


def _scores(query: Array, key: Array) -> Array:
    return jnp.einsum("kgtd,ksd->kgts", query, key, preferred_element_type=jnp.float32)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; queries, keys and values come from one matrix product."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = Linear(config.hidden_size, heads * config.head_dim, config.qkv_bias, rngs)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size, config.out_bias, rngs)

    def __call__(self, x: Array, angles: tuple[Array, Array], blocks: tuple[Block, ...]) -> tuple[Array, Any]:
        """Output [T, hidden] and this layer's cache entries: rotated keys and values [kv_heads, T, head_dim]."""
        config, length = self.config, x.shape[0]
        heads = self.qkv(x).reshape(length, -1, config.head_dim).swapaxes(0, 1)
        query, key, value = jnp.split(heads, [config.num_heads, config.num_heads + config.num_kv_heads])
        query = rotate(query, angles).reshape(config.num_kv_heads, -1, length, config.head_dim)
        key = rotate(key, angles)
        mixed = attend(query, key, value, blocks).reshape(config.num_heads, length, config.head_dim)
        return self.out(mixed.swapaxes(0, 1).reshape(length, -1)), (key, value)


class MLP(nnx.Module):
    """SwiGLU: silu(gate) * up, projected down; gate and up come from one matrix product."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias, rngs)
        self.down = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias, rngs)

    def __call__(self, x: Array) -> Array:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


class Layer(nnx.Module):
    """Attention and MLP, each after a norm and added to its input."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Array, angles: tuple[Array, Array], blocks: tuple[Block, ...]) -> tuple[Array, Any]:
        mixed, entries = self.attention(self.attention_norm(x), angles, blocks)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), entries


class Transformer(nnx.Module):
    """The network, randomly initialised; `TransformerLM.from_module` makes a language model of it.

    Layers are unrolled with separate weights: a scan over stacked weights copies every layer's weights each step.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tied else nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

    def features(self, tokens: Array, memory: Memory) -> tuple[Array, tuple[Any, ...]]:
        """Features [T, hidden] of int32[T] after `memory`, and per layer (keys, values) [kv_heads, T, head_dim]."""
        x = self.embedding[...][tokens]
        config = self.config
        angles = rotary_angles(config.head_dim, config.rope_theta, config.rope_scaling, memory.position, tokens.shape[0])
        entries = []
        for index, layer in enumerate(self.layers):
            blocks = tuple(Block(block.entries[index], block.mask) for block in memory.blocks)
            x, entry = layer(x, angles, blocks)
            entries.append(entry)
        return self.norm(x), tuple(entries)

    def unembed(self, features: Array) -> Array:
        """Logits float32[T, V] of features [T, hidden]."""
        head = self.embedding if self.head is None else self.head
        return project(features, head[...]).astype(jnp.float32)

    def __call__(self, tokens: Array) -> Array:
        """Logits float32[B, T, V] of int[B, T], for training."""
        return jax.vmap(lambda sequence: self.unembed(self.features(sequence, empty_memory())[0]))(tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TransformerLM:
    """A `Transformer` with its tokenizer as a `LanguageModel`: a pytree whose leaves are the weights."""

    weights: Any
    """Nested dict of arrays: the state of the `Transformer`."""
    graph: Any = field(metadata={"static": True})
    config: TransformerConfig = field(metadata={"static": True})
    tokenizer: Tokenizer | None = field(default=None, metadata={"static": True})

    @classmethod
    def from_module(cls, module: Transformer, tokenizer: Tokenizer | None = None) -> "TransformerLM":
        """The language model of a module's present weights."""
        graph, state = nnx.split(module)
        return cls(nnx.to_pure_dict(state), graph, module.config, tokenizer)

    def to_module(self) -> Transformer:
        """The module with these weights, for example to train it further."""
        return nnx.merge(self.graph, self.weights)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def eos_id(self) -> int:
        return self.config.eos_id

    @property
    def start_id(self) -> int:
        return self.config.eos_id if self.config.bos_id is None else self.config.bos_id

    @property
    def adds_start(self) -> bool:
        return self.tokenizer is not None and self.tokenizer.adds_start

    @property
    def max_length(self) -> int:
        return self.config.max_length

    def _text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer: its directory holds no tokenizer.json. "
                "Add that file and load again, or work with token ids"
            )
        return self.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without a start token."""
        return self._text().encode(text)

    def decode(self, ids: Any) -> str:
        """The text of token ids; special tokens, start and end included, are left out."""
        excluded = {self.eos_id, self.config.bos_id}
        return self._text().decode([i for i in np.asarray(ids).ravel().tolist() if i not in excluded])

    def token_bytes(self) -> list[bytes]:
        """The exact bytes of each token, b"" for special tokens and for rows that pad the vocabulary; length V."""
        known = self._text().token_bytes()
        return known + [b""] * (self.vocab_size - len(known))

    def forward(self, tokens: Array, memory: Memory) -> tuple[Array, tuple[Any, ...]]:
        """Features [T, hidden] and per layer (keys, values) [kv_heads, T, head_dim] of int32[T] after `memory`."""
        return self.to_module().features(tokens, memory)

    def unembed(self, features: Array) -> Array:
        """Logits float32[T, V] of features [T, hidden]."""
        return self.to_module().unembed(features)

    def logits(self, tokens: Any) -> Array:
        """Logits float32[T, V] of a whole sequence int[T]; row t predicts token t + 1."""
        return _logits(self, jnp.asarray(tokens, jnp.int32))


@jax.jit
def _logits(lm: TransformerLM, tokens: Array) -> Array:
    features, _ = lm.forward(tokens, empty_memory())
    return lm.unembed(features)
