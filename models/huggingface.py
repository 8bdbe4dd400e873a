"""Directories in Hugging Face layout: config.json, safetensors weights, tokenizer files."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from latentrace.models.config import TransformerConfig
from latentrace.models.errors import CheckpointError
from latentrace.models.families import FAMILIES, Names
from latentrace.models.hf_config import read_config, read_json, to_hf_config, token_name
from latentrace.models.lora import Adapter
from latentrace.models.sharding import place
from latentrace.models.tensor_files import TensorFiles
from latentrace.models.tokenizer import Tokenizer
from latentrace.models.transformer import Transformer, TransformerLM

UNUSED = re.compile(
    r"rotary_emb\.inv_freq$|(attn|attention)\.(bias|masked_bias)$|^(vision_tower|vision_model|multi_modal_projector)\."
)
"""Tensors that are constants, or belong to parts of a multimodal model that text does not need."""
TIED = re.compile(rf"{UNUSED.pattern}|^lm_head\.")
"""The same where the head is the embedding, which may be stored twice."""


@dataclass(frozen=True)
class Weight:
    """One array of a `Transformer` and the tensors on disk that make it up."""

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    """Tensors joined by rows (outputs); names without prefix."""
    rows: tuple[int, ...]
    """Rows of each tensor."""
    transposed: bool = False
    grouped: tuple[int, int, int] | None = None
    """(kv_heads, group, head_dim) where rows are all queries, all keys, all values on disk, by key-value head here."""

    @property
    def is_matrix(self) -> bool:
        """Whether its last axis is a column on disk, and it is kept in the model's dtype; vectors stay float32."""
        return self.path[-1] in {"kernel", "embedding", "positions", "head"}

    @property
    def columns(self) -> tuple[int, ...]:
        """The shape of a row."""
        return self.shape[-1:] if self.is_matrix else ()

    @property
    def disk_shapes(self) -> list[tuple[int, ...]]:
        """The shape of each tensor on disk."""
        shapes = [(rows, *self.columns) for rows in self.rows]
        return [shape[::-1] if self.transposed else shape for shape in shapes]

    def join(self, tensors: list[Any], xp: Any = np) -> Any:
        """The array made of the tensors, by NumPy or by `jax.numpy`."""
        parts = [tensor.T if self.transposed else tensor for tensor in tensors]
        joined = parts[0] if len(parts) == 1 else xp.concatenate(parts)
        if self.grouped is None:
            return joined.reshape(self.shape)
        kv_heads, group, head_dim = self.grouped
        bounds = np.cumsum([kv_heads * group, kv_heads]) * head_dim
        heads = [part.reshape(kv_heads, -1, head_dim, *self.columns) for part in xp.split(joined, bounds)]
        return xp.concatenate(heads, axis=1)

    def split(self, value: np.ndarray) -> list[np.ndarray]:
        """The tensors that make the array: the inverse of `join`."""
        rows = value.reshape(-1, *self.columns)
        if self.grouped is not None:
            heads = np.split(value, [self.grouped[1], self.grouped[1] + 1], axis=1)
            rows = np.concatenate([part.reshape(-1, *self.columns) for part in heads])
        parts = np.split(rows, np.cumsum(self.rows)[:-1])
        return [np.ascontiguousarray(part.T if self.transposed else part) for part in parts]


def weight_table(config: TransformerConfig) -> Iterator[Weight]:
    """Every array of the model of `config`, with its place on disk."""
    names, hidden = FAMILIES[config.family].names, config.hidden_size
    matrix = (config.vocab_size, hidden)
    yield Weight(("embedding",), matrix, (f"{names.embedding}.weight",), matrix[:1])
    if config.learned_positions:
        places = (config.learned_positions, hidden)
        yield Weight(("positions",), places, (f"{names.positions}.weight",), places[:1])
    for i in range(config.num_layers):
        for weight in _layer_weights(config, names):
            on_disk = tuple(f"{names.layer.format(i)}.{name}" for name in weight.names)
            yield replace(weight, path=("layers", i, *weight.path), names=on_disk)
    yield from _norm(config, ("norm",), names.norm, (hidden,))
    if not config.tied:
        yield Weight(("head",), matrix, (f"{names.head}.weight",), matrix[:1])


def _layer_weights(config: TransformerConfig, names: Names) -> Iterator[Weight]:
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    kv_heads, group = config.num_kv_heads, config.group
    for infix, where in (("", "before"), ("_post", "after")):
        for name in (f"attention{infix}_norm", f"mlp{infix}_norm") if config.norm_places in {where, "both"} else ():
            yield from _norm(config, (name,), getattr(names, name), (hidden,))
    queries, keys = config.num_heads * head_dim, kv_heads * head_dim
    rows = (queries, keys, keys) if len(names.qkv) == 3 else (queries + 2 * keys,)
    outputs, grouped = (kv_heads, group + 2, head_dim), None if names.by_head else (kv_heads, group, head_dim)
    yield from _linear(names, ("attention", "qkv"), names.qkv, rows, outputs, hidden, config.qkv_bias, grouped)
    yield from _linear(names, ("attention", "out"), (names.out,), (hidden,), (hidden,), queries, config.out_bias)
    if config.qk_norm:
        shapes = ((kv_heads, group, head_dim), (kv_heads, head_dim)) if config.qk_norm == "all" else ((head_dim,), (head_dim,))
        yield from _norm(config, ("attention", "query_norm"), names.query_norm, shapes[0])
        yield from _norm(config, ("attention", "key_norm"), names.key_norm, shapes[1])
    count = 1 + config.gated
    rows = (inner,) * count if len(names.up) == count else (count * inner,)
    yield from _linear(names, ("mlp", "up"), names.up, rows, (count, inner), hidden, config.mlp_bias)
    yield from _linear(names, ("mlp", "down"), (names.down,), (hidden,), (hidden,), inner, config.mlp_bias)


def _norm(config: TransformerConfig, path: tuple[Any, ...], name: str, shape: tuple[int, ...]) -> Iterator[Weight]:
    rows = (int(np.prod(shape)),)
    yield Weight((*path, "scale"), shape, (f"{name}.weight",), rows)
    if config.norm == "layer":
        yield Weight((*path, "bias"), shape, (f"{name}.bias",), rows)


def _linear(names: Names, path: tuple[Any, ...], on_disk: tuple[str, ...], rows: tuple[int, ...], outputs: tuple[int, ...],
            inputs: int, bias: bool, grouped: tuple[int, int, int] | None = None) -> Iterator[Weight]:  # fmt: skip
    kernels = tuple(f"{name}.weight" for name in on_disk)
    yield Weight((*path, "kernel"), (*outputs, inputs), kernels, rows, names.transposed, grouped)
    if bias:
        yield Weight((*path, "bias"), outputs, tuple(f"{name}.bias" for name in on_disk), rows, False, grouped)


class Checkpoint:
    """A directory whose configuration, tokenizer, and tensors' names, shapes and dtypes have been checked, none read yet."""

    def __init__(self, directory: Path, dtype: str, max_length: int | None, adapter: Path | None = None, head: str = ""):
        """`head` names a tensor [K, hidden] that takes the place of the output head."""
        tokenizer_config = read_json(directory / "tokenizer_config.json", required=False)
        path = directory / "tokenizer.json"
        bare = Tokenizer.from_file(path) if path.exists() else None
        self.config = read_config(directory, bare, tokenizer_config, max_length, dtype)
        self.config = replace(self.config, tied=True) if head else self.config
        self.tokenizer = None
        if bare is not None:
            template = _chat_template(directory, tokenizer_config)
            self.tokenizer = Tokenizer(bare.definition, self.config.bos_id, self.config.eos_id, template)
            if bare.vocab_size > self.config.vocab_size:
                raise CheckpointError(
                    f"{path} has {bare.vocab_size} tokens but vocab_size in config.json is {self.config.vocab_size}; "
                    "the two belong to different models"
                )
        self.files = TensorFiles(directory)
        self.table = list(weight_table(self.config))
        expected = {name: shape for weight in self.table for name, shape in zip(weight.names, weight.disk_shapes)}
        if head:
            expected[head] = (self.files.rows(head), self.config.hidden_size)
        self.files.check(expected, TIED if self.config.tied else UNUSED)
        self.changes = None if adapter is None else Adapter(adapter, set(expected))

    def read(self) -> TransformerLM:
        """The language model. Arrays are read one at a time, so that never more than one of them is in memory twice."""
        weights: dict = {}
        for weight in self.table:
            tensors = [self.files.read(name) for name in weight.names]
            if self.changes is not None:
                tensors = [self.changes.apply(name, tensor) for name, tensor in zip(weight.names, tensors)]
            dtype = self.config.dtype if weight.is_matrix else np.float32
            value = weight.join(tensors).astype(dtype, copy=False)
            put_weight(weights, weight.path, place(weight.path, value))
        module = nnx.eval_shape(lambda: Transformer(self.config, rngs=nnx.Rngs(0)))
        return TransformerLM(weights, nnx.split(module)[0], self.config, self.tokenizer)


def save_directory(lm: TransformerLM, directory: Path, dtype: Any = None) -> None:
    """Write config.json, model.safetensors in `dtype`, and the tokenizer's files where the model has one."""
    dtype = jnp.dtype(dtype or lm.config.dtype)
    raw = to_hf_config(lm.config) | {"torch_dtype": dtype.name}
    directory.mkdir(parents=True, exist_ok=True)
    names = FAMILIES[lm.config.family].names
    tensors: dict[str, np.ndarray] = {}
    for weight in weight_table(lm.config):
        value = np.asarray(weight_at(lm.weights, weight.path)).astype(dtype)
        prefix = "" if weight.path == ("head",) else names.prefix
        tensors |= {prefix + name: part for name, part in zip(weight.names, weight.split(value))}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", raw)
    special = {"bos_token_id": lm.config.bos_id, "eos_token_id": lm.config.eos_id}
    write_json(directory / "generation_config.json", {k: v for k, v in special.items() if v is not None})
    if lm.tokenizer is not None:
        (directory / "tokenizer.json").write_text(lm.tokenizer.definition, encoding="utf-8")
        spelt = {key.removesuffix("_id"): token_name(lm.tokenizer, index) for key, index in special.items()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings |= {"model_max_length": lm.config.max_length, "chat_template": lm.tokenizer.chat_template} | spelt
        write_json(directory / "tokenizer_config.json", {k: v for k, v in settings.items() if v is not None})


def write_json(path: Path, content: dict) -> None:
    """Write a configuration file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _chat_template(directory: Path, tokenizer_config: dict) -> str | None:
    """The template of chats: a file of its own or an option; of several, the one named "default"."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template


def weight_at(tree: Any, path: tuple[Any, ...]) -> Any:
    """The array at a path of a nested dict of weights."""
    for key in path:
        tree = tree[key]
    return tree


def put_weight(tree: dict, path: tuple[Any, ...], value: jax.Array) -> None:
    """Put an array at a path of a nested dict of weights."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
