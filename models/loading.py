"""`load` and `save`: language models by name or directory."""

import difflib
from pathlib import Path
from typing import Any

import numpy as np

from latentrace.models.errors import CheckpointError
from latentrace.models.huggingface import load_directory, save_directory
from latentrace.models.transformer import TransformerLM

SHIPPED = {"reasoner": Path(__file__).parent / "reasoner" / "checkpoint"}
"""Names of the models that come with the package, and their directories."""


def load(name_or_path: str | Path) -> TransformerLM:
    """A shipped model by name ("reasoner"), or a directory in Hugging Face layout; weights become float32.

    The directory holds config.json (Llama, Mistral or Qwen2), model.safetensors or its shards with their index, and
    tokenizer.json (without it, only token ids can be used). Raises `CheckpointError` where something is amiss.
    """
    shipped = SHIPPED.get(str(name_or_path))
    directory = shipped or Path(name_or_path).expanduser()
    if not directory.is_dir():
        if shipped:
            raise CheckpointError(f"the shipped model {name_or_path!r} is missing from {shipped}; reinstall latentrace")
        raise CheckpointError(f"{_not_found(directory)}; the shipped models are {', '.join(map(repr, SHIPPED))}")
    return load_directory(directory)


def save(lm: TransformerLM, directory: str | Path, dtype: Any = np.float32) -> None:
    """Write a transformer as a directory that `load` and transformers read; weights are stored in `dtype`."""
    if not isinstance(lm, TransformerLM):
        raise TypeError(f"only a TransformerLM can be saved as a checkpoint, got {type(lm).__name__}")
    save_directory(lm, Path(directory).expanduser(), dtype)


def _not_found(directory: Path) -> str:
    if directory.is_file():
        return f"{directory} is a file; give the directory that holds config.json and the weights"
    siblings = [p.name for p in directory.parent.iterdir() if p.is_dir()] if directory.parent.is_dir() else []
    near = difflib.get_close_matches(directory.name, [*SHIPPED, *siblings], n=3)
    hint = f" (did you mean {' or '.join(repr(name) for name in near)}?)" if near else ""
    return f"there is no model named {str(directory)!r} and no directory of that name{hint}"
