"""Directories in Hugging Face layout: config.json, safetensors weights, tokenizer files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from latentrace.models.errors import CheckpointError
from latentrace.models.hf_config import read_config, read_json, to_hf_config, token_name
from latentrace.models.tokenizer import Tokenizer
from latentrace.models.transformer import Transformer, TransformerConfig, TransformerLM


@dataclass(frozen=True)
class Weight:
    """One array of a `Transformer` and the tensors on disk that make it up."""

    path: tuple[Any, ...]
    names: tuple[str, ...]
    """Tensors joined along their first axis (outputs)."""
    shapes: tuple[tuple[int, ...], ...]


def weight_table(config: TransformerConfig) -> Iterator[Weight]:
    """Every array of the model of `config`, with its place on disk."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield Weight(("embedding",), ("model.embed_tokens.weight",), ((config.vocab_size, hidden),))
    for i in range(config.num_layers):
        disk, here = f"model.layers.{i}", ("layers", i)
        yield Weight((*here, "attention_norm", "scale"), (f"{disk}.input_layernorm.weight",), ((hidden,),))
        yield Weight((*here, "mlp_norm", "scale"), (f"{disk}.post_attention_layernorm.weight",), ((hidden,),))
        names = tuple(f"{disk}.self_attn.{part}_proj" for part in "qkv")
        yield from _linear((*here, "attention", "qkv"), names, (queries, keys, keys), hidden, config.qkv_bias)
        names = (f"{disk}.self_attn.o_proj",)
        yield from _linear((*here, "attention", "out"), names, (hidden,), queries, config.out_bias)
        names = (f"{disk}.mlp.gate_proj", f"{disk}.mlp.up_proj")
        yield from _linear((*here, "mlp", "gate_up"), names, (inner, inner), hidden, config.mlp_bias)
        yield from _linear((*here, "mlp", "down"), (f"{disk}.mlp.down_proj",), (hidden,), inner, config.mlp_bias)
    yield Weight(("norm", "scale"), ("model.norm.weight",), ((hidden,),))
    if not config.tied:
        yield Weight(("head",), ("lm_head.weight",), ((config.vocab_size, hidden),))


def _linear(
    path: tuple[Any, ...], names: tuple[str, ...], outputs: tuple[int, ...], inputs: int, bias: bool
) -> Iterator[Weight]:
    kernels = tuple((size, inputs) for size in outputs)
    yield Weight((*path, "kernel"), tuple(f"{name}.weight" for name in names), kernels)
    if bias:
        yield Weight((*path, "bias"), tuple(f"{name}.bias" for name in names), tuple((size,) for size in outputs))


def load_directory(directory: Path) -> TransformerLM:
    """The language model of a directory; everything is checked before any weight is read."""
    tokenizer_config = read_json(directory / "tokenizer_config.json", required=False)
    path = directory / "tokenizer.json"
    bare = Tokenizer.from_file(path) if path.exists() else None
    config = read_config(directory, bare, tokenizer_config)
    tokenizer = None if bare is None else Tokenizer(bare.definition, config.bos_id, config.eos_id)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} tokens but vocab_size in config.json is {config.vocab_size}; "
            "the two belong to different models"
        )
    shards = _tensor_files(directory)
    table = list(weight_table(config))
    _check_tensors(directory, shards, table, config)
    module = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return TransformerLM(_read_weights(shards, table), nnx.split(module)[0], config, tokenizer)


def save_directory(lm: TransformerLM, directory: Path, dtype: Any = np.float32) -> None:
    """Write config.json, model.safetensors in `dtype`, and the tokenizer's files where the model has one."""
    directory.mkdir(parents=True, exist_ok=True)
    dtype = jnp.dtype(dtype)
    tensors: dict[str, np.ndarray] = {}
    for weight in weight_table(lm.config):
        value = np.asarray(_get(lm.weights, weight.path)).astype(dtype)
        bounds = np.cumsum([shape[0] for shape in weight.shapes])[:-1]
        tensors |= {n: np.ascontiguousarray(part) for n, part in zip(weight.names, np.split(value, bounds))}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", to_hf_config(lm.config, dtype.name))
    special = {"bos_token_id": lm.config.bos_id, "eos_token_id": lm.config.eos_id}
    _write_json(directory / "generation_config.json", {k: v for k, v in special.items() if v is not None})
    if lm.tokenizer is not None:
        (directory / "tokenizer.json").write_text(lm.tokenizer.definition, encoding="utf-8")
        names = {key.removesuffix("_id"): token_name(lm.tokenizer, index) for key, index in special.items()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings |= {"model_max_length": lm.config.max_length}
        _write_json(directory / "tokenizer_config.json", settings | {k: v for k, v in names.items() if v is not None})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        files = sorted({directory / name for name in read_json(index).get("weight_map", {}).values()})
    else:
        other = sorted(p.name for p in directory.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".gguf"})
        hint = f"; {', '.join(other)} cannot be read, convert to safetensors" if other else ""
        raise CheckpointError(f"{directory} has neither {single.name} nor {index.name}{hint}")
    found: dict[str, Path] = {}
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{index} names {file.name}, which is missing; copy all shards of the model")
        with _open(file) as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}); download it again") from error


def _check_tensors(directory: Path, found: dict[str, Path], table: list[Weight], config: TransformerConfig) -> None:
    """Every tensor is there, with its shape and a float dtype, and no other is (it would silently be left out)."""
    expected = {name: shape for weight in table for name, shape in zip(weight.names, weight.shapes)}
    missing = [name for name in expected if name not in found]
    if missing:
        hint = "; set tie_word_embeddings to true if the head is the embedding" if missing == ["lm_head.weight"] else ""
        raise CheckpointError(f"{directory} lacks {len(missing)} tensor(s): {', '.join(missing[:3])}{hint}")
    ignored = {"lm_head.weight"} if config.tied else set()
    unknown = [n for n in found if n not in expected and n not in ignored and not n.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise CheckpointError(
            f"{found[unknown[0]]} holds {len(unknown)} tensor(s) that this architecture has no place for: "
            f"{', '.join(unknown[:3])}; check model_type, attention_bias and mlp_bias in config.json"
        )
    for file in sorted(set(found.values())):
        with _open(file) as tensors:
            for name in (name for name in expected if found[name] == file):
                part = tensors.get_slice(name)
                if tuple(part.get_shape()) != expected[name]:
                    raise CheckpointError(
                        f"{name} in {file} has shape {tuple(part.get_shape())}, config.json implies {expected[name]}"
                    )
                if part.get_dtype() not in {"F32", "F16", "BF16"}:
                    raise CheckpointError(
                        f"{name} in {file} is stored as {part.get_dtype()}; save it as float32, float16 or bfloat16"
                    )


def _read_weights(found: dict[str, Path], table: list[Weight]) -> dict:
    files = {file: _open(file) for file in set(found.values())}
    weights: dict = {}
    for weight in table:
        parts = [files[found[name]].get_tensor(name).astype(np.float32) for name in weight.names]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts)
        _put(weights, weight.path, jnp.asarray(value))
    return weights


def _get(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: dict, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
