"""The supported families of checkpoints: for each, how its config.json and its tensors' names differ from Llama's.

A family is a table of differences. `Names` maps the arrays of a `Transformer` to tensors on disk; the other fields of
`Family` map `TransformerConfig` to the keys of config.json, in both directions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from latentrace.models.config import TransformerConfig


@dataclass(frozen=True)
class Names:
    """Tensors on disk, without the family's prefix and without ".weight" or ".bias". Several names are joined by rows."""

    embedding: str = "embed_tokens"
    positions: str = ""
    layer: str = "layers.{}"
    norm: str = "norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = ""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    transposed: bool = False
    """Whether matrices of layers are stored [inputs, outputs]."""
    by_head: bool = False
    """Whether queries, keys and values are interleaved head by head on disk, as they are here."""
    prefix: str = "model."
    """Before every name but the head's."""


@dataclass(frozen=True)
class Family:
    """One value of `model_type` in config.json."""

    architecture: str
    names: Names = Names()
    keys: dict[str, str] = field(default_factory=dict)
    """Field of `TransformerConfig` -> key of config.json, beyond or instead of `KEYS`."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Values of keys that config.json may leave out."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Fields of `TransformerConfig` that are the same in the whole family."""
    sliding: Callable[[int, dict], bool] = lambda layer, raw: False
    """Whether a layer has the sliding window, where config.json has no `layer_types`."""
    layer_types: bool = True
    """Whether config.json may name the type of each layer."""
    derive: Callable[[dict], dict[str, Any]] = lambda raw: {}
    """Fields of `TransformerConfig` that need computing."""
    write: Callable[[TransformerConfig], dict[str, Any]] = lambda config: {}
    """The inverse of `derive`."""


KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tied": "tie_word_embeddings",
}
DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0}
ATTENTION_BIAS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}


def _gemma(raw: dict) -> dict[str, Any]:
    scale = raw["query_pre_attn_scalar"] ** -0.5 if "query_pre_attn_scalar" in raw else None
    return {"embedding_scale": raw["hidden_size"] ** 0.5, "attention_scale": scale}


def _gemma_write(config: TransformerConfig) -> dict[str, Any]:
    return {} if config.attention_scale is None else {"query_pre_attn_scalar": round(config.attention_scale**-2)}


def _gpt2(raw: dict) -> dict[str, Any]:
    return {
        "attention_scale": None if raw.get("scale_attn_weights", True) else 1.0,
        "intermediate_size": raw.get("n_inner") or 4 * raw["n_embd"],
        "learned_positions": raw["n_positions"],
    }


def _gpt2_write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "scale_attn_weights": config.attention_scale is None,
        "n_inner": config.intermediate_size,
        "n_positions": config.learned_positions,
    }


LLAMA = Family("LlamaForCausalLM", keys=ATTENTION_BIAS | {"mlp_bias": "mlp_bias"}, layer_types=False)
MISTRAL = Family("MistralForCausalLM", defaults={"sliding_window": 4096}, sliding=lambda layer, raw: True, layer_types=False)
QWEN2 = Family(
    "Qwen2ForCausalLM",
    defaults={"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
    fixed={"qkv_bias": True},
    sliding=lambda layer, raw: layer >= raw["max_window_layers"],
)
QWEN3 = replace(
    QWEN2,
    architecture="Qwen3ForCausalLM",
    keys=ATTENTION_BIAS,
    defaults=QWEN2.defaults | {"head_dim": 128},
    fixed={"qk_norm": "head"},
)
GEMMA = Family(
    "GemmaForCausalLM",
    keys=ATTENTION_BIAS,
    defaults={"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256},
    fixed={"norm_offset": 1.0},
    derive=lambda raw: _gemma(raw) | ({"activation": "gelu_tanh"} if raw["hidden_act"] == "gelu" else {}),  # as released
    write=_gemma_write,
    layer_types=False,
)
GEMMA2 = Family(
    "Gemma2ForCausalLM",
    names=Names(
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    keys=ATTENTION_BIAS
    | {
        "activation": "hidden_activation",
        "attention_cap": "attn_logit_softcapping",
        "logit_cap": "final_logit_softcapping",
    },
    defaults={
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    fixed={"norm_offset": 1.0, "norm_places": "both"},
    sliding=lambda layer, raw: layer % 2 == 0,
    derive=_gemma,
    write=_gemma_write,
)
GEMMA3 = replace(
    GEMMA2,
    architecture="Gemma3ForCausalLM",
    defaults=GEMMA2.defaults
    | {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    fixed=GEMMA2.fixed | {"qk_norm": "head"},
    sliding=lambda layer, raw: (layer + 1) % raw["sliding_window_pattern"] != 0,
)
PHI3 = Family(
    "Phi3ForCausalLM",
    names=Names(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
    defaults={"rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096},
    sliding=lambda layer, raw: True,
    layer_types=False,
)
SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    keys=ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
    defaults={"tie_word_embeddings": True, "rope_theta": 2e6, "use_sliding_window": False, "no_rope_layer_interval": 4},
    sliding=lambda layer, raw: not raw["no_rope_layers"][layer],
)
OLMO2 = Family(
    "Olmo2ForCausalLM",
    names=Names(
        attention_norm="",
        attention_post_norm="post_attention_layernorm",
        mlp_norm="",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    keys=ATTENTION_BIAS,
    defaults={"rms_norm_eps": 1e-5},
    fixed={"norm_places": "after", "qk_norm": "all"},
    layer_types=False,
)
GPT2 = Family(
    "GPT2LMHeadModel",
    names=Names(
        embedding="wte",
        positions="wpe",
        layer="h.{}",
        norm="ln_f",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        transposed=True,
        prefix="transformer.",
    ),
    keys={
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "max_length": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "activation": "activation_function",
        "divide_scale_by_layer": "scale_attn_by_inverse_layer_idx",
        "intermediate_size": "",
        "num_kv_heads": "",
        "head_dim": "",
    },
    defaults={
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "scale_attn_by_inverse_layer_idx": False,
    },
    fixed={"norm": "layer", "gated": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    derive=_gpt2,
    write=_gpt2_write,
    layer_types=False,
)
GPT_NEOX = Family(
    "GPTNeoXForCausalLM",
    names=Names(
        embedding="embed_in",
        norm="final_layer_norm",
        head="embed_out",
        qkv=("attention.query_key_value",),
        out="attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        by_head=True,
        prefix="gpt_neox.",
    ),
    keys=ATTENTION_BIAS
    | {"norm_eps": "layer_norm_eps", "parallel": "use_parallel_residual", "num_kv_heads": "", "head_dim": ""},
    defaults={
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "attention_bias": True,
        "use_parallel_residual": True,
        "partial_rotary_factor": 0.25,
    },
    fixed={"norm": "layer", "gated": False, "mlp_bias": True},
    layer_types=False,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
}
"""By `model_type`."""
