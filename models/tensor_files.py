"""Named tensors of a directory's safetensors files, memory-mapped: one file, or shards with an index."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from latentrace.models.errors import CheckpointError
from latentrace.models.hf_config import read_json

PREFIX = re.compile(r"^(base_model\.model\.)?(language_model\.)?(model\.|transformer\.|gpt_neox\.)?(language_model\.)?")
"""What precedes a tensor's name, according to the class that saved it."""
HEADS = {"embed_out": "lm_head"}
"""Other spellings of an output head."""


def bare_name(name: str) -> str:
    """A tensor's name without what differs between the classes that save it."""
    head, dot, rest = PREFIX.sub("", name).partition(".")
    return HEADS.get(head, head) + dot + rest


class TensorFiles:
    """The tensors of `stem`.safetensors, or of the shards that its index names, in a directory."""

    def __init__(self, directory: Path, stem: str = "model"):
        self.directory = directory
        self._found: dict[str, tuple[Any, str, Path]] = {}
        for path in _files(directory, stem):
            file = _open(path)
            self._found |= {bare_name(name): (file, name, path) for name in file.keys()}  # noqa: SIM118  (not a dict)

    def __contains__(self, name: str) -> bool:
        return bare_name(name) in self._found

    def check(self, expected: dict[str, tuple[int, ...]], unused: re.Pattern[str]) -> None:
        """Every tensor is there, with its shape and a float dtype, and no other is (it would silently be left out)."""
        expected = {bare_name(name): shape for name, shape in expected.items()}
        missing = [name for name in expected if name not in self._found]
        if missing:
            hint = "; set tie_word_embeddings to true if the head is the embedding" if missing == ["lm_head.weight"] else ""
            raise CheckpointError(f"{self.directory} lacks {len(missing)} tensor(s): {', '.join(missing[:3])}{hint}")
        unknown = [name for name in self._found if name not in expected and not unused.search(name)]
        if unknown:
            raise CheckpointError(
                f"{self._found[unknown[0]][2]} holds {len(unknown)} tensor(s) that this architecture has no place for: "
                f"{', '.join(self._found[name][1] for name in unknown[:3])}; check model_type and the biases in config.json"
            )
        for name, shape in expected.items():
            file, stored, path = self._found[name]
            part = file.get_slice(stored)
            if tuple(part.get_shape()) != shape:
                raise CheckpointError(f"{stored} in {path} has shape {tuple(part.get_shape())}, config.json implies {shape}")
            if part.get_dtype() not in {"F32", "F16", "BF16"}:
                raise CheckpointError(
                    f"{stored} in {path} is stored as {part.get_dtype()}; save it as float32, float16 or bfloat16"
                )

    def rows(self, name: str) -> int:
        """The first size of a matrix."""
        if name not in self:
            raise CheckpointError(f"{self.directory} has no tensor {name}; is it a checkpoint of another kind?")
        file, stored, _ = self._found[bare_name(name)]
        return file.get_slice(stored).get_shape()[0]

    def names(self) -> list[str]:
        """The bare names of all tensors."""
        return list(self._found)

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored. Raises `CheckpointError` where it is not finite."""
        file, stored, path = self._found[bare_name(name)]
        tensor = file.get_tensor(stored)
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{stored} in {path} holds NaN or infinity; download or convert the model again")
        return tensor


def _files(directory: Path, stem: str) -> list[Path]:
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        other = sorted(p.name for p in directory.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".gguf"})
        hint = f"; {', '.join(other)} cannot be read, convert to safetensors" if other else ""
        raise CheckpointError(f"{directory} has neither {single.name} nor {index.name}{hint}")
    files = sorted({directory / name for name in read_json(index).get("weight_map", {}).values()})
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{index} names {file.name}, which is missing; copy all shards of the model")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}); download it again") from error
