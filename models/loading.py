"""`load` and `save`: language models by name or directory."""

import difflib
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from latentrace.models.errors import CheckpointError
from latentrace.models.huggingface import Checkpoint, save_directory
from latentrace.models.reward import RewardModel
from latentrace.models.transformer import TransformerLM

SHIPPED = {"reasoner": Path(__file__).parent / "reasoner" / "checkpoint"}
"""Names of the models that come with the package, and their directories."""


def load(
    name_or_path: str | Path, *, dtype: Any = "float32", max_length: int | None = None, adapter: str | Path | None = None
) -> TransformerLM:
    """A shipped model by name ("reasoner"), or a directory in Hugging Face layout.

    The directory holds config.json (of one of `latentrace.models.families`), model.safetensors or its shards with their
    index, and tokenizer.json (without it, only token ids can be used). Weights may be stored in float32, float16 or
    bfloat16; `dtype`, float32 or bfloat16, is that of matrices in memory and of operands of matrix products (results and
    log-probabilities stay float32). `max_length` shortens the context, or chooses the long one of a model that has two
    (longrope). `adapter` is a directory with a LoRA adapter in PEFT's layout, added to the weights. Under
    `jax.set_mesh`, weights are split over devices (`latentrace.models.sharding`).

    Raises `CheckpointError` where something is amiss.

        >>> from latentrace import models
        >>> models.load("reasoner").config.num_layers
        5
    """
    directory = _directory(name_or_path)
    adapter = None if adapter is None else Path(adapter).expanduser()
    return Checkpoint(directory, _dtype(dtype), max_length, adapter).read()


def load_reward(directory: str | Path, *, dtype: Any = "float32", max_length: int | None = None) -> RewardModel:
    """A sequence-classification checkpoint (`...ForSequenceClassification`) of any supported family.

    The arguments are those of `load`. Raises `CheckpointError` where something is amiss, such as a missing score head.
    """
    checkpoint = Checkpoint(_directory(directory), _dtype(dtype), max_length, head=SCORE)
    kernel = jnp.asarray(checkpoint.files.read(SCORE).astype(checkpoint.config.dtype))
    return RewardModel(checkpoint.read(), kernel)


SCORE = "score.weight"


def _dtype(dtype: Any) -> str:
    name = jnp.dtype(dtype).name
    if name not in {"float32", "bfloat16"}:
        raise ValueError(f"dtype is {name}; a model computes in float32 or bfloat16")
    return name


def _directory(name_or_path: str | Path) -> Path:
    shipped = SHIPPED.get(str(name_or_path))
    directory = shipped or Path(name_or_path).expanduser()
    if not directory.is_dir():
        if shipped:
            raise CheckpointError(f"the shipped model {name_or_path!r} is missing from {shipped}; reinstall latentrace")
        raise CheckpointError(f"{_not_found(directory)}; the shipped models are {', '.join(map(repr, SHIPPED))}")
    return directory


def save(lm: TransformerLM, directory: str | Path, dtype: Any = None) -> None:
    """Write a transformer as a directory that `load` and transformers read; weights are stored in `dtype` (None: as they
    are). Hooks are not saved. Raises `CheckpointError` where the model's family cannot express its options."""
    if not isinstance(lm, TransformerLM):
        raise TypeError(f"only a TransformerLM can be saved as a checkpoint, got {type(lm).__name__}")
    if lm.num_embeddings != lm.vocab_size:
        raise ValueError("this model holds a soft prompt, which is no part of a checkpoint: save its base model, and it apart")
    save_directory(lm, Path(directory).expanduser(), dtype)


def _not_found(directory: Path) -> str:
    if directory.is_file():
        return f"{directory} is a file; give the directory that holds config.json and the weights"
    siblings = [p.name for p in directory.parent.iterdir() if p.is_dir()] if directory.parent.is_dir() else []
    near = difflib.get_close_matches(directory.name, [*SHIPPED, *siblings], n=3)
    hint = f" (did you mean {' or '.join(repr(name) for name in near)}?)" if near else ""
    return f"there is no model named {str(directory)!r} and no directory of that name{hint}"
