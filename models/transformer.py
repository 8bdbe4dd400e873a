"""A decoder-only transformer, and the language model made of one.

One sequence at a time, after a `Memory` of cached blocks; batches are `jax.vmap` of that. A block shared by the whole
batch stays unbatched under `vmap`, so that attention over it is one matrix product for all particles. A pass over
several new tokens is how texts are scored, and where speculative decoding would put its drafts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latentrace.models.config import LayerOptions, TransformerConfig
from latentrace.models.layers import Layer, Norm, View, new_matrix, project, soft_cap, view
from latentrace.models.tokenizer import Tokenizer
from latentrace.ppl.language_model import Array, Memory, empty_memory


class Transformer(nnx.Module):
    """The network, randomly initialised; `TransformerLM.from_module` makes a language model of it.

    Layers are unrolled with separate weights: a scan over stacked weights copies every layer's weights each step.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = new_matrix(rngs, shape, config)
        places = (config.learned_positions, config.hidden_size)
        self.positions = new_matrix(rngs, places, config) if config.learned_positions else None
        self.layers = nnx.List([Layer(config, index, rngs) for index in range(config.num_layers)])
        self.norm = Norm((config.hidden_size,), config)
        self.head = None if config.tied else new_matrix(rngs, shape, config)

    def features(self, tokens: Array, memory: Memory, hooks: "Hooks | None" = None) -> tuple[Array, tuple[Any, ...]]:
        """Features [T, hidden] of int32[T] after `memory`, and per layer (keys, values) [kv_heads, T, head_dim]."""
        config, positions = self.config, memory.position + jnp.arange(tokens.shape[0])
        x = self.embedding[...][tokens] * jnp.asarray(config.embedding_scale, config.dtype)
        if self.positions is not None:
            x = x + self.positions[...].at[positions].get(mode="clip")
        x = x.astype(jnp.float32)
        views = {options: self._view(options, memory, positions) for options in set(config.layer_pattern)}
        entries = []
        for index, layer in enumerate(self.layers):
            x, entry = layer(x, [block.entries[index] for block in memory.blocks], views[config.layer(index)])
            for hook in (hooks or {}).get(index, ()):
                x = hook(x)
            entries.append(entry)
        return self.norm(x), tuple(entries)

    def _view(self, options: LayerOptions, memory: Memory, positions: Array) -> View:
        angles = options.rope.angles(self.config.head_dim, positions) if options.rope else None
        return View(*view(memory, positions.shape[0], options.window), angles)

    def unembed(self, features: Array) -> Array:
        """Logits float32[T, V] of features [T, hidden]."""
        head = self.embedding if self.head is None else self.head
        rows = head[...][: self.config.vocab_size]  # a table may have more: vectors that are read and never written
        return soft_cap(project(features, rows), self.config.logit_cap)

    def __call__(self, tokens: Array) -> Array:
        """Logits float32[B, T, V] of int[B, T], for training."""
        return jax.vmap(lambda sequence: self.unembed(self.features(sequence, empty_memory())[0]))(tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hook:
    """A function of the residual stream after a layer: float32[T, hidden] and its own operands to float32[T, hidden]."""

    edit: Callable[..., Array] = field(metadata={"static": True})
    operands: tuple[Any, ...]

    def __call__(self, x: Array) -> Array:
        return self.edit(x, *self.operands)


Hooks = dict[int, tuple[Hook, ...]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TransformerLM:
    """A `Transformer` with its tokenizer as a `LanguageModel`: a pytree whose leaves are the weights."""

    weights: Any
    """Nested dict of arrays: the state of the `Transformer`."""
    graph: Any = field(metadata={"static": True})
    config: TransformerConfig = field(metadata={"static": True})
    tokenizer: Tokenizer | None = field(default=None, metadata={"static": True})
    hooks: Hooks = field(default_factory=dict)
    """By layer, what `with_hook` added."""

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
    def num_embeddings(self) -> int:
        """How many token ids may be given: those from `vocab_size` on, a `SoftPrompt`'s, are read and never written."""
        return self.weights["embedding"].shape[0]  # type: ignore[no-any-return]

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
        return self.to_module().features(tokens, memory, self.hooks)

    def unembed(self, features: Array) -> Array:
        """Logits float32[T, V] of features [T, hidden]."""
        return self.to_module().unembed(features)

    def logits(self, tokens: Any) -> Array:
        """Logits float32[T, V] of a whole sequence int[T]; row t predicts token t + 1."""
        return _logits(self, jnp.asarray(tokens, jnp.int32))

    def with_hook(self, layer: int, edit: Callable[..., Array], *operands: Any) -> "TransformerLM":
        """The same weights, with the residual stream edited after a layer (0 is the first, -1 the last).

        `edit(x, *operands)` maps float32[T, hidden] to the same shape, token by token. Give arrays as operands (a
        steering vector, a probe's weights), so that another value compiles nothing; edits of one layer follow in order.

            steered = lm.with_hook(12, lambda x, v: x + v, vector)

        Raises ValueError where there is no such layer.
        """
        index = layer % self.config.num_layers
        if index != layer and layer != index - self.config.num_layers:
            raise ValueError(f"layer is {layer}; this model has layers 0 to {self.config.num_layers - 1}")
        return replace(self, hooks=self.hooks | {index: (*self.hooks.get(index, ()), Hook(edit, operands))})

    def hidden(self, tokens: Any, layers: Sequence[int]) -> Array:
        """The residual stream float32[len(layers), T, hidden] after some layers of a whole sequence int[T]."""
        return _hidden(self, jnp.asarray(tokens, jnp.int32), tuple(layers))


@jax.jit
def _logits(lm: TransformerLM, tokens: Array) -> Array:
    features, _ = lm.forward(tokens, empty_memory())
    return lm.unembed(features)


@partial(jax.jit, static_argnums=2)
def _hidden(lm: TransformerLM, tokens: Array, layers: tuple[int, ...]) -> Array:
    seen: dict[int, Array] = {}
    for layer in layers:

        def read(x: Array, layer: int = layer) -> Array:
            seen[layer] = x
            return x

        lm = lm.with_hook(layer, read)
    lm.forward(tokens, empty_memory())
    return jnp.stack([seen[layer] for layer in layers])
