"""Small random checkpoints of every supported family, exercising its peculiarities, made without torch."""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).resolve().parent / "golden"
SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1)  # fmt: skip
GPT2_SIZES = dict(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=1)
GEMMA = dict(head_dim=12, query_pre_attn_scalar=20, sliding_window=7)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.2, 1.5],
    long_factor=[1.0, 2.0, 3.5, 6.0],
    original_max_position_embeddings=32,
)
YARN_OPTIONS = dict(mscale=0.7, mscale_all_dim=1.2, beta_fast=8, beta_slow=2, truncate=False)
MILD_LONGROPE = LONGROPE | dict(attention_factor=1.2)
CASES = {
    "llama": ("llama", {}),
    "llama-tied-biases-head_dim": (
        "llama", dict(attention_bias=True, mlp_bias=True, head_dim=10, tie_word_embeddings=True, num_key_value_heads=4),
    ),
    "llama-llama3": ("llama", dict(rope_theta=500.0, rope_scaling=LLAMA3)),
    "llama-linear": ("llama", dict(rope_scaling=dict(rope_type="linear", factor=3.0))),
    "llama-dynamic": ("llama", dict(rope_scaling=dict(rope_type="dynamic", factor=3.0))),
    "llama-yarn": ("llama", dict(rope_theta=1000.0, rope_scaling=YARN)),
    "llama-yarn-options": (
        "llama",
        dict(rope_theta=300.0, rope_scaling=YARN | YARN_OPTIONS),
    ),
    "mistral-window": ("mistral", dict(sliding_window=8, num_key_value_heads=1, rms_norm_eps=1e-3)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=14, tie_word_embeddings=True)),
    "qwen3-biases": ("qwen3", dict(head_dim=8, attention_bias=True)),
    "gemma": ("gemma", dict(head_dim=12, num_key_value_heads=1)),
    "gemma2": ("gemma2", GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": ("gemma3_text", GEMMA | dict(num_hidden_layers=4, sliding_window_pattern=3, rope_local_base_freq=100.0)),
    "gemma3-scaled": (
        "gemma3_text",
        GEMMA
        | dict(sliding_window_pattern=2, final_logit_softcapping=2.5, rope_scaling=dict(rope_type="linear", factor=8.0)),
    ),
    "phi3": ("phi3", dict(partial_rotary_factor=0.5, pad_token_id=1)),
    "phi3-window-longrope": (
        "phi3", dict(sliding_window=9, pad_token_id=1, original_max_position_embeddings=4, rope_scaling=MILD_LONGROPE),
    ),
    "phi3-short": (
        "phi3", dict(pad_token_id=1, original_max_position_embeddings=128, rope_scaling=LONGROPE),
    ),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0, 1], pad_token_id=1)),
    "olmo2": ("olmo2", dict(pad_token_id=1)),
    "olmo2-biases": ("olmo2", dict(pad_token_id=1, attention_bias=True, num_key_value_heads=4)),
    "gpt2": ("gpt2", {}),
    "gpt2-options": ("gpt2", dict(n_inner=20, scale_attn_by_inverse_layer_idx=True, activation_function="relu")),
    "gpt2-unscaled": ("gpt2", dict(scale_attn_weights=False, tie_word_embeddings=False)),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": ("gpt_neox", dict(use_parallel_residual=False, attention_bias=False, rotary_pct=0.5)),
}  # fmt: skip
"""Name -> model_type and what its config.json says beyond the sizes."""
MAX_LENGTH = {"phi3-window-longrope": 256}
"""What `load` is asked for where it decides which rotary frequencies hold."""


def config_of(case: str) -> dict:
    """The content of config.json."""
    model_type, changes = CASES[case]
    return {"model_type": model_type} | (GPT2_SIZES if model_type == "gpt2" else SIZES) | changes


def random_tensor(name: str, shape: tuple[int, ...], seed: int, model_type: str) -> np.ndarray:
    """A tensor that depends on nothing but its name, shape and seed, in whatever version of NumPy."""
    noise = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape)
    if len(shape) == 1:
        centre = 1.0 if "norm" in name or "ln_" in name else 0.0
        centred = 0.0 if name.endswith("bias") or model_type.startswith("gemma") else centre
        return (centred + 0.2 * noise).astype(np.float32)
    outer = any(part in name for part in ("embed", "wte", "wpe", "head"))
    scale = 0.04 if outer else 0.1  # five times the usual start; much larger ones make even the reference's bfloat16 chaotic
    return (scale * noise).astype(np.float32)


def write_checkpoint(directory: Path, case: str, shapes: dict[str, tuple[int, ...]], seed: int) -> Path:
    """config.json and model.safetensors of a case."""
    config = config_of(case)
    tensors = {name: random_tensor(name, tuple(shape), seed, config["model_type"]) for name, shape in shapes.items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory
