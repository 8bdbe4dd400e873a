"""Low-rank adapters in PEFT's layout, as files: added to a base model's weights as they are read, or read to train on.

A target matrix W becomes W + scale * B A, with A [rank, inputs] and B [outputs, rank] (arXiv:2106.09685, section 4.1).
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from latentrace.models.errors import CheckpointError
from latentrace.models.hf_config import read_json
from latentrace.models.tensor_files import TensorFiles, bare_name

TENSOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_(embedding_)?[AB]|base_layer)(\.weight)?")
UNSUPPORTED = {
    "use_dora": "weight-decomposed adapters",
    "modules_to_save": "whole modules saved with the adapter",
    "lora_bias": "biases inside the adapter",
}


class Adapter:
    """What an adapter adds to each tensor of its base model."""

    def __init__(self, directory: Path, targets: set[str]):
        """Read adapter_config.json and adapter_model.safetensors; `targets` are the base model's tensor names."""
        self.path = directory / "adapter_config.json"
        self.config = read_json(self.path)
        if self.config.get("peft_type") != "LORA":
            raise CheckpointError(f"{self.path}: peft_type is {self.config.get('peft_type')!r}; only 'LORA' is supported")
        for option, meaning in UNSUPPORTED.items():
            if self.config.get(option):
                raise CheckpointError(f"{self.path}: {option} is set, but {meaning} are not supported; merge it with peft")
        if self.config.get("bias", "none") != "none":
            raise CheckpointError(f"{self.path}: bias is {self.config['bias']!r}, but only 'none' is supported")
        self.files = TensorFiles(directory, "adapter_model")
        self.parts: dict[str, dict[str, str]] = {}
        targets = {bare_name(name) for name in targets}
        for name in self.files.names():
            match = TENSOR.fullmatch(name)
            target = "" if match is None else f"{match['module']}.weight"
            if match is None or target not in targets:
                raise CheckpointError(f"{directory}: {name} fits no tensor of the base model; was it trained on another one?")
            self.parts.setdefault(target, {})[match["part"]] = name

    def apply(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """A tensor of the base model with its adapter's product added, in float32."""
        parts = self.parts.get(bare_name(name))
        if parts is None:
            return tensor
        if "base_layer" in parts:  # peft stores embeddings with the adapter, in case they had grown
            tensor = self.files.read(parts["base_layer"])
        scale, a, b = self.factors(name)
        change = scale * (b @ a)
        if "lora_embedding_A" in parts or self.config.get("fan_in_fan_out"):
            change = change.T
        if change.shape != tensor.shape:
            raise CheckpointError(
                f"{self.path.parent}: the adapter of {name} has shape {change.shape}, the base model's is {tensor.shape}"
            )
        return tensor.astype(np.float32) + change

    def factors(self, name: str) -> tuple[float, np.ndarray, np.ndarray]:
        """What scale * B A is added to a tensor: the scale, A float32[rank, inputs] and B float32[outputs, rank]."""
        parts = self.parts[bare_name(name)]
        kind = "lora_embedding_" if "lora_embedding_A" in parts else "lora_"
        try:
            a, b = (self.files.read(parts[kind + side]).astype(np.float32) for side in "AB")
        except KeyError as error:
            raise CheckpointError(f"{self.path.parent}: the adapter of {name} lacks its {error.args[0]}") from error
        return self._scale(bare_name(name).removesuffix(".weight"), a.shape[0]), a, b

    def _scale(self, module: str, rank: int) -> float:
        alpha = _of_module(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank


def _of_module(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
