"""Hugging Face's config.json read into a `TransformerConfig`, and written back."""

import json
from pathlib import Path
from typing import Any

from latentrace.models.errors import CheckpointError
from latentrace.models.rotary import RopeScaling
from latentrace.models.tokenizer import Tokenizer
from latentrace.models.transformer import TransformerConfig

MODEL_TYPES = ("llama", "mistral", "qwen2")
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
}
"""Our name of each required size -> its name in config.json."""


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """The object in a JSON file; empty where an optional file is absent."""
    if not path.exists():
        if required:
            raise CheckpointError(f"{path} is missing; a model directory needs config.json and *.safetensors")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def read_config(directory: Path, tokenizer: Tokenizer | None, tokenizer_config: dict) -> TransformerConfig:
    """The configuration of the model in `directory`; anything that would change its meaning unseen is an error."""
    path = directory / "config.json"
    raw = read_json(path)
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"{path}: model_type is {model_type!r}; supported are {', '.join(MODEL_TYPES)}")
    if raw.get("hidden_act", "silu") not in {"silu", "swish"}:
        raise CheckpointError(f"{path}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported")
    if raw.get("quantization_config"):
        raise CheckpointError(f"{path}: quantization_config is set; save the model unquantised")
    sizes = {ours: _size(raw, theirs, path) for ours, theirs in SIZES.items()}
    _check_window(raw, sizes["max_length"], path)
    rope_theta, rope_scaling = _rope(raw, sizes["max_length"], path)
    generation = read_json(directory / "generation_config.json", required=False)
    bos_id, eos_id = (_special_id(kind, tokenizer, tokenizer_config, raw, generation) for kind in ("bos", "eos"))
    if eos_id is None or not 0 <= eos_id < sizes["vocab_size"]:
        raise CheckpointError(f"{path}: eos_token_id is {eos_id}; set it to the id of the token that ends a text")
    if bos_id is not None and not 0 <= bos_id < sizes["vocab_size"]:
        raise CheckpointError(f"{path}: bos_token_id is {bos_id}, outside the vocabulary; correct it or set it to null")
    attention_bias = bool(raw.get("attention_bias", False))
    head_dim = raw.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"]
    try:
        return TransformerConfig(
            **sizes,
            num_kv_heads=raw.get("num_key_value_heads") or sizes["num_heads"],
            head_dim=head_dim,
            eos_id=eos_id,
            bos_id=bos_id,
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or model_type == "qwen2",
            out_bias=attention_bias and model_type == "llama",
            mlp_bias=bool(raw.get("mlp_bias", False)),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _size(raw: dict, name: str, path: Path) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {name} is {value!r}, expected a positive integer")
    return value


def _check_window(raw: dict, max_length: int, path: Path) -> None:
    """Attention over a sliding window is not implemented; a window that never slides is fine."""
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    if window is not None and window < max_length:
        raise CheckpointError(
            f"{path}: sliding_window is {window} with max_position_embeddings {max_length}; windows are not supported. "
            f"Set max_position_embeddings to {window} to use the model within its window"
        )


def _rope(raw: dict, max_length: int, path: Path) -> tuple[float, RopeScaling | None]:
    """The rotary base and rescaling, from either of the two spellings in use."""
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(name) or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor is not supported")
    if kind == "default":
        return theta, None
    if kind == "llama3":
        missing = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key not in rope]
        if missing:
            raise CheckpointError(f"{path}: {name} lacks {', '.join(missing)}, which type 'llama3' needs")
        original = rope.get("original_max_position_embeddings", max_length)
        return theta, RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
    raise CheckpointError(f"{path}: {name} has type {kind!r}; supported are 'default' and 'llama3'")


def _special_id(kind: str, tokenizer: Tokenizer | None, tokenizer_config: dict, *configs: dict) -> int | None:
    """The id of the start ("bos") or end ("eos") token: the tokenizer's word first, then each config's."""
    name = tokenizer_config.get(f"{kind}_token")
    name = name.get("content") if isinstance(name, dict) else name
    if tokenizer is not None and name is not None and tokenizer.token_id(name) is not None:
        return tokenizer.token_id(name)
    for config in configs:
        value = config.get(f"{kind}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            return value
    return None


def token_name(tokenizer: Tokenizer, token_id: int | None) -> str | None:
    """How tokenizer_config.json spells a special token."""
    return None if token_id is None else tokenizer.token_name(token_id)


def to_hf_config(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json. Biases on queries, keys and values alone are Qwen2's; otherwise it is a Llama."""
    qwen = config.qkv_bias and not config.out_bias
    if (qwen and config.mlp_bias) or (config.out_bias and not config.qkv_bias):
        raise CheckpointError("no Hugging Face architecture has this combination of qkv_bias, out_bias and mlp_bias")
    raw: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    raw |= {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen else "llama",
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "torch_dtype": dtype,
    }
    if qwen:
        raw["use_sliding_window"] = False
    else:
        raw |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    return raw
