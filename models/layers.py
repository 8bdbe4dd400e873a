"""The parts of a transformer layer: matrix products, norms, attention over cached blocks, MLP."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from latentrace.models.config import TransformerConfig
from latentrace.models.rotary import rotate
from latentrace.ppl.language_model import Array, Memory

MASKED = -1e30
"""Score of a slot that may not be seen: finite, so that a block without visible slots gives no NaN."""
FEW_TOKENS = 16
"""Up to this many new tokens a forward pass counts as decoding, not as prefill or training."""
QUERIES, BANDS = 256, 4
"""How many tokens attend at a time in a long pass, and in how many bands it goes."""
Blocks = Sequence[Array]
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def project(x: Array, kernel: Array) -> Array:
    """Rows [T, inputs] times a kernel [*outputs, inputs]: float32[T, *outputs], from operands of the kernel's dtype.

    With few tokens per sequence the kernel goes first: XLA's CPU product of a large matrix and few columns, which is
    what `vmap` over particles makes of it, runs 1.4 times as fast as few rows and a large matrix.
    """
    x, contracted = x.astype(kernel.dtype), kernel.ndim - 1
    if x.shape[0] > FEW_TOKENS:
        dims = (((1,), (contracted,)), ((), ()))
        return jax.lax.dot_general(x, kernel, dims, preferred_element_type=jnp.float32)
    dims = (((contracted,), (1,)), ((), ()))
    return jnp.moveaxis(jax.lax.dot_general(kernel, x, dims, preferred_element_type=jnp.float32), -1, 0)


def soft_cap(x: Array, cap: float | None) -> Array:
    """x pressed smoothly into (-cap, cap)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def new_matrix(rngs: nnx.Rngs, shape: tuple[int, ...], config: TransformerConfig) -> nnx.Param:
    """A random matrix in the model's dtype."""
    return nnx.Param((0.02 * jax.random.normal(rngs.params(), shape)).astype(config.dtype))


class Linear(nnx.Module):
    """A matrix product and an optional bias. The kernel lies [*outputs, inputs], as in checkpoints."""

    def __init__(self, inputs: int, outputs: tuple[int, ...], bias: bool, config: TransformerConfig, rngs: nnx.Rngs):
        self.kernel = new_matrix(rngs, (*outputs, inputs), config)
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: Array) -> Array:
        product = project(x, self.kernel[...])
        return product if self.bias is None else product + self.bias[...]


class Norm(nnx.Module):
    """RMS or layer norm over the last axes, as many as `shape` has, times a learnt scale."""

    def __init__(self, shape: tuple[int, ...], config: TransformerConfig):
        self.config, self.axes = config, tuple(range(-len(shape), 0))
        self.scale = nnx.Param(jnp.full(shape, 1.0 - config.norm_offset, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(shape)) if config.norm == "layer" else None

    def __call__(self, x: Array) -> Array:
        if self.bias is not None:
            x = x - x.mean(self.axes, keepdims=True)
        size = jnp.square(x).mean(self.axes, keepdims=True)
        x = x * jax.lax.rsqrt(size + self.config.norm_eps) * (self.config.norm_offset + self.scale[...])
        return x if self.bias is None else x + self.bias[...]


class View(NamedTuple):
    """What new tokens see in the layers that share one kind of options."""

    blocks: tuple[Array, ...]
    """bool[S] or bool[T, S] per block: visible slots"""
    own: Array
    """bool[T, T]: visible new tokens"""
    angles: tuple[Array, Array] | None
    """rotary cosines and sines [T, dim / 2]"""


def view(memory: Memory, length: int, window: int | None) -> tuple[tuple[Array, ...], Array]:
    """The masks of a `View` of `length` new tokens after `memory`."""
    step = jnp.arange(length)
    own = step[:, None] >= step
    masks = tuple(block.mask for block in memory.blocks)
    if window is None:
        return masks, own
    # a context's tokens lie in order of time, so a slot's position is the number of the context's slots before it
    position, before, visible = memory.position + step[:, None], jnp.int32(0), []
    for mask in masks:
        place = before + jnp.cumsum(mask) - 1
        before = before + mask.sum()
        visible.append(mask & (place > position - window))
    return tuple(visible), own & (step > step[:, None] - window)


def attend(query: Array, key: Array, value: Array, entries: list[Any], seen: View, cap: float | None) -> Array:
    """Attention of new tokens over cached blocks and over themselves: float32[kv_heads, group, T, head_dim].

    `query` [kv_heads, group, T, head_dim] comes scaled, `key` and `value` are [kv_heads, T, head_dim]; `entries` are
    (keys, values) of each block. A long pass goes in bands, each of which reads no key beyond its own end.
    """
    length, mixed = query.shape[-2], []
    band = QUERIES * -(-length // (BANDS * QUERIES))
    for start in range(0, length, band):
        stop = min(start + band, length)
        keys, values = zip(*entries, (key[:, :stop], value[:, :stop]))
        own = seen.own[start:stop, :stop]
        masks = [mask if mask.ndim == 1 else mask[start:stop] for mask in seen.blocks]
        mixed.append(_attend_in_parts(query[..., start:stop, :], keys, values, [*masks, own], cap))
    return mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, axis=-2)


def _attend_in_parts(query: Array, keys: Blocks, values: Blocks, masks: Blocks, cap: float | None) -> Array:
    """Attention of a few queries at a time, so that their scores stay in the processor's cache."""
    length = query.shape[-2]
    if length <= QUERIES:
        return _attend(query, keys, values, masks, cap)
    parts = -(-length // QUERIES)

    def split(x: Array) -> Array:  # [T, ...] to [parts, QUERIES, ...]
        padded = jnp.pad(x, [(0, parts * QUERIES - length)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(parts, QUERIES, *x.shape[1:])

    def one(part: tuple[Array, dict[int, Array]]) -> Array:
        some = [part[1].get(i, mask) for i, mask in enumerate(masks)]
        return _attend(part[0].transpose(1, 2, 0, 3), keys, values, some, cap).transpose(2, 0, 1, 3)

    by_query = {i: split(mask) for i, mask in enumerate(masks) if mask.ndim == 2}
    mixed = jax.lax.map(one, (split(query.transpose(2, 0, 1, 3)), by_query))
    return mixed.reshape(-1, *mixed.shape[2:])[:length].transpose(1, 2, 0, 3)


def _attend(query: Array, keys: Blocks, values: Blocks, masks: Blocks, cap: float | None) -> Array:
    """Attention over all blocks. Scores are concatenated, never keys: under `vmap` that would copy a shared block per
    particle."""

    def scores(key: Array, mask: Array) -> Array:
        product = jnp.einsum("kgtd,ksd->kgts", query.astype(key.dtype), key, preferred_element_type=jnp.float32)
        return jnp.where(mask, soft_cap(product, cap), MASKED)

    together = jnp.concatenate([*map(scores, keys, masks)], axis=-1)
    weights = jnp.exp(together - together.max(-1, keepdims=True))
    mixed, start = jnp.float32(0), 0
    for v in values:
        some = weights[..., start : start + v.shape[-2]].astype(v.dtype)
        mixed += jnp.einsum("kgts,ksd->kgtd", some, v, preferred_element_type=jnp.float32)
        start += v.shape[-2]
    return mixed / weights.sum(-1, keepdims=True)


class Attention(nnx.Module):
    """Grouped-query attention. Queries, keys and values come from one matrix product, by key-value head."""

    def __init__(self, config: TransformerConfig, index: int, rngs: nnx.Rngs):
        self.config = config
        kv_heads, group, head_dim = config.num_kv_heads, config.group, config.head_dim
        scale = head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.scale = scale / (index + 1) if config.divide_scale_by_layer else scale
        self.qkv = Linear(config.hidden_size, (kv_heads, group + 2, head_dim), config.qkv_bias, config, rngs)
        self.out = Linear(config.num_heads * head_dim, (config.hidden_size,), config.out_bias, config, rngs)
        shapes = {"head": ((head_dim,), (head_dim,)), "all": ((kv_heads, group, head_dim), (kv_heads, head_dim))}
        norms = shapes.get(config.qk_norm or "")
        self.query_norm = Norm(norms[0], config) if norms else None
        self.key_norm = Norm(norms[1], config) if norms else None

    def __call__(self, x: Array, blocks: list[Any], seen: View) -> tuple[Array, Any]:
        """Output [T, hidden] and this layer's cache entries: keys and values [kv_heads, T, head_dim]."""
        heads = self.qkv(x)
        query, key, value = heads[:, :, :-2], heads[:, :, -2], heads[:, :, -1]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = query.transpose(1, 2, 0, 3), key.swapaxes(0, 1), value.swapaxes(0, 1)
        if seen.angles is not None:
            query, key = rotate(query, seen.angles), rotate(key, seen.angles)
        key, value = key.astype(self.config.dtype), value.astype(self.config.dtype)
        mixed = attend(self.scale * query, key, value, blocks, seen, self.config.attention_cap)
        return self.out(mixed.transpose(2, 0, 1, 3).reshape(x.shape[0], -1)), (key, value)


class MLP(nnx.Module):
    """activation(gate) * up, or activation(up), projected down; gate and up come from one matrix product."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        outputs = (1 + config.gated, config.intermediate_size)
        self.up = Linear(config.hidden_size, outputs, config.mlp_bias, config, rngs)
        self.down = Linear(config.intermediate_size, (config.hidden_size,), config.mlp_bias, config, rngs)

    def __call__(self, x: Array) -> Array:
        up = self.up(x)
        inner = ACTIVATIONS[self.activation](up[:, 0])
        return self.down(inner * up[:, 1] if up.shape[1] == 2 else inner)


class Layer(nnx.Module):
    """Attention and MLP, each added to its input."""

    def __init__(self, config: TransformerConfig, index: int, rngs: nnx.Rngs):
        norm = lambda place: Norm((config.hidden_size,), config) if config.norm_places in (place, "both") else None
        self.parallel = config.parallel
        self.attention_norm, self.attention_post_norm = norm("before"), norm("after")
        self.attention = Attention(config, index, rngs)
        self.mlp_norm, self.mlp_post_norm = norm("before"), norm("after")
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Array, blocks: list[Any], seen: View) -> tuple[Array, Any]:
        mixed, entries = self.attention(_apply(self.attention_norm, x), blocks, seen)
        attended = x + _apply(self.attention_post_norm, mixed)
        inner = self.mlp(_apply(self.mlp_norm, x if self.parallel else attended))
        return attended + _apply(self.mlp_post_norm, inner), entries


def _apply(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)
