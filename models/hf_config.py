"""Hugging Face's config.json read into a `TransformerConfig`, and written back."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from latentrace.models.config import LayerOptions, TransformerConfig
from latentrace.models.errors import CheckpointError
from latentrace.models.families import DEFAULTS, FAMILIES, KEYS, Family
from latentrace.models.rotary import Dynamic, Linear, Llama3, LongRope, Rope, Scaling, Yarn
from latentrace.models.tokenizer import Tokenizer

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""Name in config.json -> ours."""
REFUSED = {
    "quantization_config": "save the model unquantised",
    "add_cross_attention": "only decoders without an encoder are supported",
    "use_bidirectional_attention": "a language model sees only what precedes a token",
}
"""Options that would change the model's meaning unseen, and what to do."""
NULLABLE = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
"""Options whose null is a value; elsewhere null means that the option is left out."""
SLIDING, FULL = "sliding_attention", "full_attention"


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


def read_config(
    directory: Path, tokenizer: Tokenizer | None, tokenizer_config: dict, max_length: int | None, dtype: str
) -> TransformerConfig:
    """The configuration of the model in `directory`; anything that would change its meaning unseen is an error."""
    path = directory / "config.json"
    raw = read_json(path)
    text = raw.get("text_config")
    if isinstance(text, dict):  # the text part of a multimodal model
        raw = raw | text
    generation = read_json(directory / "generation_config.json", required=False)
    try:
        vocab_size = _size(raw, "vocab_size")
        bos_id, eos_id = (_special_id(kind, tokenizer, tokenizer_config, raw, generation) for kind in ("bos", "eos"))
        if eos_id is None or not 0 <= eos_id < vocab_size:
            raise ValueError(f"eos_token_id is {eos_id}; set it to the id of the token that ends a text")
        if bos_id is not None and not 0 <= bos_id < vocab_size:
            raise ValueError(f"bos_token_id is {bos_id}, outside the vocabulary; correct it or set it to null")
        return replace(parse(raw, max_length), eos_id=eos_id, bos_id=bos_id, dtype=dtype)
    except (ValueError, TypeError, KeyError) as error:
        what = f"{error} is missing or malformed" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: {what}") from error


def parse(raw: dict[str, Any], max_length: int | None = None) -> TransformerConfig:
    """The model that the content of a config.json describes. Raises ValueError where an option is not supported."""
    model_type = raw.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ValueError(f"model_type is {model_type!r}; supported are {', '.join(FAMILIES)}")
    for option, mend in REFUSED.items():
        if raw.get(option):
            raise ValueError(f"{option} is set; {mend}")
    raw = DEFAULTS | family.defaults | {key: value for key, value in raw.items() if value is not None or key in NULLABLE}
    keys = {ours: theirs for ours, theirs in (KEYS | family.keys).items() if theirs}
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_length"):
        _size(raw, keys[name])
    found = {ours: raw[theirs] for ours, theirs in keys.items() if theirs in raw}
    found["activation"] = _activation(found["activation"], keys["activation"])
    found |= {name: bool(found[name]) for name in found if name.endswith("_bias")}
    found.setdefault("num_kv_heads", found["num_heads"])
    found.setdefault("head_dim", found["hidden_size"] // found["num_heads"])
    found |= family.fixed | family.derive(raw)
    _size(found, "intermediate_size")
    trained = raw.get("original_max_position_embeddings") if _rope_type(raw) == "longrope" else None
    allowed = found["max_length"]
    if max_length is not None and max_length > allowed:
        raise ValueError(f"{keys['max_length']} is {allowed}, less than the max_length of {max_length} asked for")
    found["max_length"] = max_length or trained or allowed
    pattern = _layers(raw, family, found)
    special = {"eos_id": 0, "bos_id": None, "family": str(model_type)}
    return TransformerConfig(**(found | special | {"layer_pattern": pattern}))


def _size(raw: dict, name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive integer")
    return value


def _activation(name: Any, key: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"{key} is {name!r}; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _layers(raw: dict, family: Family, found: dict) -> tuple[LayerOptions, ...]:
    """The options of every layer, or of the shortest run of layers that repeats."""
    count = found["num_layers"]
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    rotary = [True] * count
    if "no_rope_layer_interval" in raw:  # SmolLM3
        every = raw["no_rope_layer_interval"]
        raw = {"no_rope_layers": [(i + 1) % every for i in range(count)]} | raw
        rotary = [bool(uses) for uses in raw["no_rope_layers"]]
    types = raw.get("layer_types") if family.layer_types else None
    if types is None:
        types = [SLIDING if window is not None and family.sliding(i, raw) else FULL for i in range(count)]
    if len(types) < count or len(rotary) < count or not set(types) <= {SLIDING, FULL}:
        raise ValueError(f"layer_types must name each of the {count} layers '{FULL}' or '{SLIDING}'")
    kinds = {}
    for kind in set(types):
        rope = None if found.get("learned_positions") else _rope(raw, kind, found)
        kinds[kind] = LayerOptions(rope, window if kind == SLIDING else None)
    layers = [kinds[kind] if uses else replace(kinds[kind], rope=None) for kind, uses in zip(types, rotary)]
    period = next(p for p in range(1, count + 1) if all(layers[i] == layers[i % p] for i in range(count)))
    return tuple(layers[:period])


def _rope_parameters(raw: dict, kind: str = FULL) -> dict[str, Any]:
    """The rotary options of one kind of layer, from any of the spellings in use."""
    given = raw.get("rope_parameters") or {}
    nested = any(isinstance(value, dict) for value in given.values())
    own = (given.get(kind) or {}) if nested else given
    local = kind == SLIDING and "rope_local_base_freq" in raw  # Gemma 3: sliding layers turn faster and are not rescaled
    theta = raw["rope_local_base_freq"] if local else raw.get("rotary_emb_base", raw["rope_theta"])
    fraction = raw.get("rotary_pct", raw.get("partial_rotary_factor", 1.0))
    scaling = {} if local else raw.get("rope_scaling") or {}
    return {"rope_theta": theta, "partial_rotary_factor": fraction} | scaling | (own if nested or not local else {})


def _rope_type(raw: dict) -> str:
    rope = _rope_parameters(DEFAULTS | raw)
    kind = rope.get("rope_type", rope.get("type", "default"))
    legacy = raw.get("model_type") == "phi3" and kind in {"su", "yarn"}
    return "longrope" if legacy else str(kind)


def _rope(raw: dict, kind: str, found: dict) -> Rope:
    rope = _rope_parameters(raw, kind)
    name = _rope_type(raw) if kind == FULL else str(rope.get("rope_type", rope.get("type", "default")))
    original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original, factor = int(original or raw["max_position_embeddings"]), rope.get("factor")
    scaling: Scaling | None
    try:
        if name == "default":
            scaling = None
        elif name == "linear":
            scaling = Linear(float(rope["factor"]))
        elif name == "dynamic":
            scaling = Dynamic(float(rope["factor"]))
        elif name == "llama3":
            scaling = Llama3(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
        elif name == "yarn":
            factor = factor or raw["max_position_embeddings"] / original
            fast, slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
            scaling = Yarn(factor, original, _yarn_attention(rope, factor), fast, slow, rope.get("truncate", True))
        elif name == "longrope":
            factor = factor or raw["max_position_embeddings"] / original
            attention = rope.get("attention_factor")
            if attention is None:
                attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            short, long = tuple(rope["short_factor"]), tuple(rope["long_factor"])
            scaling = LongRope(short, long, attention, original, found["max_length"] > original)
        else:
            supported = "default, linear, dynamic, llama3, yarn, longrope"
            raise ValueError(f"rotary positions have type {name!r}; supported are {supported}")
    except KeyError as error:
        raise ValueError(f"rotary positions of type {name!r} lack {error.args[0]}") from error
    return Rope(float(rope["rope_theta"]), float(rope["partial_rotary_factor"]), scaling)


def _yarn_attention(rope: dict, factor: float) -> float:
    """How much cosines and sines grow, by default 0.1 ln(factor) + 1."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    grow = lambda scale: 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grow(rope["mscale"]) / grow(rope["mscale_all_dim"])
    return grow(1.0)


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


def to_hf_config(config: TransformerConfig) -> dict[str, Any]:
    """The content of config.json. Raises `CheckpointError` where the model's family cannot express its options."""
    family = FAMILIES[config.family]
    keys = {ours: theirs for ours, theirs in (KEYS | family.keys).items() if theirs}
    raw: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    raw[keys["activation"]] = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.activation]
    raw |= {"architectures": [family.architecture], "model_type": config.family, "torch_dtype": config.dtype}
    raw |= {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id, "pad_token_id": None}
    raw |= family.write(config) | _write_layers(config, family)
    again = replace(parse(raw, config.max_length), eos_id=config.eos_id, bos_id=config.bos_id, dtype=config.dtype)
    wrong = [f.name for f in fields(config) if getattr(again, f.name) != getattr(config, f.name)]
    if wrong:
        raise CheckpointError(
            f"checkpoints of family {config.family!r} cannot express this model's {', '.join(wrong)}; "
            f"set another family in its config ({', '.join(FAMILIES)})"
        )
    return raw


def _write_layers(config: TransformerConfig, family: Family) -> dict[str, Any]:
    layers = [config.layer(i) for i in range(config.num_layers)]
    windows = {options.window for options in layers} - {None}
    raw: dict[str, Any] = {}
    if windows or "sliding_window" in family.defaults:
        raw["sliding_window"] = max(windows) if windows else None  # type: ignore[type-var]
    if "use_sliding_window" in family.defaults:
        raw["use_sliding_window"] = bool(windows)
    if family.layer_types:
        raw["layer_types"] = [SLIDING if options.window else FULL for options in layers]
    if "no_rope_layer_interval" in family.defaults:
        raw["no_rope_layers"] = [int(options.rope is not None) for options in layers]
    for sliding in (True, False):
        rope = next((o.rope for o in layers if o.rope and (o.window is not None) == sliding), None)
        if rope is not None and sliding and "rope_local_base_freq" in family.defaults:
            raw["rope_local_base_freq"] = rope.theta
        elif rope is not None:
            raw |= {"rope_theta": rope.theta, "partial_rotary_factor": rope.fraction}
            if config.family == "gpt_neox":
                raw |= {"rotary_emb_base": rope.theta, "rotary_pct": rope.fraction}
            if rope.scaling is not None:
                raw["rope_scaling"] = {"rope_type": rope.scaling.rope_type} | _scaling_fields(rope.scaling)
            if isinstance(rope.scaling, LongRope):
                raw["original_max_position_embeddings"] = rope.scaling.original_max_position_embeddings
    return raw


def _scaling_fields(scaling: Scaling) -> dict[str, Any]:
    found = {f.name: getattr(scaling, f.name) for f in fields(scaling) if f.name != "long"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
