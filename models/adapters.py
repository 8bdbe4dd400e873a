"""Adapters: few parameters, trained on a frozen transformer. `apply(params)` is a language model like any other.

Parameters are an ordinary pytree of float32 arrays, and gradients reach nothing else. An adapter is a pytree as well, whose
leaves are the frozen weights: give it to a compiled function as an argument, and they are inputs of it. To train all weights
no adapter is needed, as a `TransformerLM` is a pytree of them.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from latentrace.models.errors import CheckpointError
from latentrace.models.families import FAMILIES
from latentrace.models.hf_config import read_json
from latentrace.models.huggingface import Weight, put_weight, weight_at, weight_table, write_json
from latentrace.models.lora import Adapter
from latentrace.models.tensor_files import TensorFiles, bare_name
from latentrace.models.transformer import TransformerLM
from latentrace.ppl.language_model import Array

Params = dict[str, Any]
SOFT_PROMPT = "prompt_embeddings"
"""The tensor of a soft prompt, in PEFT's layout."""


@jax.tree_util.register_pytree_node_class
class LoRA:
    """Low-rank adaptation: a matrix W [outputs, inputs] becomes W + alpha / rank * B A (arXiv:2106.09685, equation 3).

    Args:
        lm: the frozen model.
        rank: rows of A and columns of B.
        alpha: as above; None stands for `rank`, a scale of 1.
        targets: which matrices, by patterns that the end of a module's name matches, as the model's family names them on disk
            ("q_proj", "layers.0.*"). None: all matrices of attention and MLPs.

    Matrices in bfloat16 round the sum: small changes are lost there, so train on a model in float32.

    Raises ValueError where `rank` is not positive or a pattern matches nothing, TypeError for other models.

    >>> import jax
    >>> from latentrace import models
    >>> lora = models.LoRA(models.load("reasoner"), rank=4, targets=["q_proj", "v_proj"])
    >>> params = lora.init(jax.random.key(0))
    >>> len(params), params["layers.0.self_attn.q_proj"]["A"].shape
    (10, (4, 128))
    >>> lora.apply(params).vocab_size == lora.lm.vocab_size
    True
    """

    def __init__(self, lm: TransformerLM, rank: int, *, alpha: float | None = None, targets: Sequence[str] | None = None):
        _check_model("LoRA", lm)
        if rank < 1:
            raise ValueError(f"LoRA: rank must be at least 1, not {rank}")
        self.lm, self.rank, self.alpha = lm, rank, float(rank if alpha is None else alpha)
        known = [module for weight in _matrices(lm) for module in _modules(weight)]
        self.modules: tuple[str, ...] = _matching(targets, known)
        """the names of the matrices that are adapted"""

    def init(self, rng_key: Array) -> Params:
        """Parameters {module: {"A": float32[rank, inputs], "B": float32[outputs, rank]}}: A normal with variance 1 / inputs,
        B zero, so that training starts at the base model."""
        shapes = {module: shape for weight in _matrices(self.lm) for module, shape in _shapes(weight).items()}
        params = {}
        for module, key in zip(self.modules, jax.random.split(rng_key, len(self.modules))):
            outputs, inputs = shapes[module]
            a = jax.random.normal(key, (self.rank, inputs)) * inputs**-0.5
            params[module] = {"A": a, "B": jnp.zeros((outputs, self.rank))}
        return params

    def apply(self, params: Params) -> TransformerLM:
        """The adapted model; differentiable in `params`, and in nothing else. Raises ValueError for those of another."""
        if other := sorted(set(params) ^ set(self.modules)):
            raise ValueError(
                f"LoRA: params are those of another adapter: {other[0]} is in one of them only; take those of `init`"
            )
        return _low_rank(self, params)

    def save(self, params: Params, directory: str | Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors in PEFT's layout: `models.load(base, adapter=directory)`
        adds them to the weights, `LoRA.load` trains further."""
        directory, tensors = Path(directory).expanduser(), {}
        names = FAMILIES[self.lm.config.family].names
        for module in self.modules:
            for side in "AB":
                tensor = np.ascontiguousarray(np.asarray(params[module][side], np.float32))
                tensors[f"base_model.model.{names.prefix}{module}.lora_{side}.weight"] = tensor
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank, "lora_alpha": self.alpha, "bias": "none"}
        config |= {"target_modules": [names.prefix + module for module in self.modules], "fan_in_fan_out": names.transposed}
        _save(directory, tensors, config | {"base_model_name_or_path": None, "lora_dropout": 0.0, "inference_mode": True})

    @classmethod
    def load(cls, lm: TransformerLM, directory: str | Path) -> tuple["LoRA", Params]:
        """An adapter in PEFT's layout for `lm`, and its parameters. Raises `CheckpointError` where it does not fit.

        Scales that differ from matrix to matrix are moved into B.
        """
        directory = Path(directory).expanduser()
        shapes = {module: shape for weight in _matrices(lm) for module, shape in _shapes(weight).items()}
        files = Adapter(directory, {name for weight in weight_table(lm.config) for name in weight.names})
        on_disk = {bare_name(f"{module}.weight"): module for module in shapes}
        if unknown := [name for name in files.parts if name not in on_disk]:
            raise CheckpointError(
                f"{directory}: {unknown[0]} is no matrix of a layer, and cannot be trained further; `models.load(base, "
                "adapter=directory)` reads such adapters"
            )
        lora = cls(
            lm, files.config["r"], alpha=files.config["lora_alpha"], targets=[re.escape(on_disk[n]) for n in files.parts]
        )
        params = {}
        for module in lora.modules:
            scale, a, b = files.factors(f"{module}.weight")
            if (b.shape[0], a.shape[1]) != shapes[module]:
                raise CheckpointError(
                    f"{directory}: the adapter of {module} has shape {(b.shape[0], a.shape[1])}, the base model's is "
                    f"{shapes[module]}"
                )
            params[module] = {"A": jnp.asarray(a), "B": jnp.asarray(b * (scale / lora.scale))}
        return lora, params

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.lm,), (self.rank, self.alpha, self.modules)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Any) -> "LoRA":
        new = object.__new__(cls)
        (new.lm,), (new.rank, new.alpha, new.modules) = leaves, static
        return new


@jax.jit
def _low_rank(lora: LoRA, params: Params) -> TransformerLM:
    lm = jax.lax.stop_gradient(lora.lm)
    for weight in _matrices(lm):
        shapes = _shapes(weight)
        if not any(module in params for module in shapes):
            continue
        changes = [_change(params.get(module), shape) for module, shape in shapes.items()]
        on_disk = [change.T if weight.transposed else change for change in changes]
        value = weight_at(lm.weights, weight.path)
        adapted = value.astype(jnp.float32) + lora.scale * weight.join(on_disk, jnp)
        put_weight(lm.weights, weight.path, adapted.astype(value.dtype))
    return lm


def _change(pair: dict[str, Array] | None, shape: tuple[int, int]) -> Array:
    """B A, float32[outputs, inputs]; zeros for a matrix without an adapter that is kept in one array with others."""
    return jnp.zeros(shape) if pair is None else pair["B"] @ pair["A"]


@jax.tree_util.register_pytree_node_class
class SoftPrompt:
    """Prompt tuning: learned vectors in front of a prompt (arXiv:2104.08691).

    The model that `apply` gives reads `length` tokens more than the base, and writes none of them: its logits keep V entries.

    Args:
        lm: the frozen model.
        length: number of vectors.

    Raises ValueError where `length` is not positive or exceeds the model's context, TypeError for other models.

    >>> import jax
    >>> from latentrace import models
    >>> soft = models.SoftPrompt(models.load("reasoner"), length=3)
    >>> lm = soft.apply(soft.init(jax.random.key(0)))
    >>> ids = soft.prompt("4 6 8 10\\n")  # for `ppl.prompt(lm, ids)`
    >>> ids[:3] == soft.ids, lm.logits(ids).shape == (len(ids), lm.vocab_size)
    (True, True)
    """

    def __init__(self, lm: TransformerLM, length: int):
        _check_model("SoftPrompt", lm)
        if not 1 <= length < lm.max_length:
            raise ValueError(f"SoftPrompt: length must be from 1 to less than the context of {lm.max_length}, not {length}")
        self.lm, self.length = lm, length

    @property
    def ids(self) -> list[int]:
        """The token ids to put in front of a prompt's."""
        return list(range(self.lm.num_embeddings, self.lm.num_embeddings + self.length))

    def prompt(self, text: str) -> list[int]:
        """The token ids of a text as a prompt, after the learned ones."""
        return [*self.ids, *([self.lm.start_id] if self.lm.adds_start else []), *self.lm.encode(text)]

    def init(self, rng_key: Array) -> Params:
        """Parameters {"prompt_embeddings": float32[length, hidden]}: the vectors of random tokens."""
        rows = jax.random.randint(rng_key, (self.length,), 0, self.lm.vocab_size)
        return {SOFT_PROMPT: self.lm.weights["embedding"][rows].astype(jnp.float32)}

    def apply(self, params: Params) -> TransformerLM:
        """The model that knows the learned tokens; differentiable in `params`, and in nothing else."""
        return _with_rows(self, params[SOFT_PROMPT])

    def save(self, params: Params, directory: str | Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors in PEFT's layout."""
        tensors = {SOFT_PROMPT: np.asarray(params[SOFT_PROMPT], np.float32)}
        sizes = {"num_virtual_tokens": self.length, "token_dim": self.lm.config.hidden_size}
        config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": None} | sizes
        _save(Path(directory).expanduser(), tensors, config)

    @classmethod
    def load(cls, lm: TransformerLM, directory: str | Path) -> tuple["SoftPrompt", Params]:
        """A soft prompt in PEFT's layout for `lm`, and its parameters. Raises `CheckpointError` where it does not fit."""
        directory = Path(directory).expanduser()
        config = read_json(directory / "adapter_config.json")
        if config.get("peft_type") != "PROMPT_TUNING":
            raise CheckpointError(
                f"{directory}: peft_type is {config.get('peft_type')!r}, that of soft prompts 'PROMPT_TUNING'"
            )
        files = TensorFiles(directory, "adapter_model")
        if SOFT_PROMPT not in files:
            raise CheckpointError(f"{directory} has no tensor {SOFT_PROMPT}; was it saved by another version of peft?")
        rows = files.read(SOFT_PROMPT).astype(np.float32)
        if rows.ndim != 2 or rows.shape[1] != lm.config.hidden_size:
            raise CheckpointError(
                f"{directory}: {SOFT_PROMPT} has shape {rows.shape}, the model's vectors have {lm.config.hidden_size}"
            )
        return cls(lm, len(rows)), {SOFT_PROMPT: jnp.asarray(rows)}

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.lm,), self.length

    @classmethod
    def tree_unflatten(cls, length: int, leaves: Any) -> "SoftPrompt":
        new = object.__new__(cls)
        (new.lm,), new.length = leaves, length
        return new


@jax.jit
def _with_rows(soft: SoftPrompt, rows: Array) -> TransformerLM:
    lm = jax.lax.stop_gradient(soft.lm)
    table = lm.weights["embedding"]
    return replace(lm, weights=lm.weights | {"embedding": jnp.concatenate([table, rows.astype(table.dtype)])})


def _check_model(name: str, lm: Any) -> None:
    if not isinstance(lm, TransformerLM):
        raise TypeError(f"{name}: lm must be a TransformerLM, not {type(lm).__name__}; other models are trained whole")


def _matrices(lm: TransformerLM) -> list[Weight]:
    """The arrays that matrices of layers are kept in."""
    return [weight for weight in weight_table(lm.config) if weight.path[0] == "layers" and weight.is_matrix]


def _modules(weight: Weight) -> list[str]:
    return [name.removesuffix(".weight") for name in weight.names]


def _shapes(weight: Weight) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each matrix that an array holds."""
    return {module: (rows, *weight.columns) for module, rows in zip(_modules(weight), weight.rows)}  # type: ignore[misc]


def _matching(targets: Sequence[str] | None, modules: list[str]) -> tuple[str, ...]:
    """The modules whose names end with one of the patterns."""
    if targets is None:
        return tuple(modules)
    if isinstance(targets, str):
        targets = [targets]
    found: set[str] = set()
    for target in targets:
        matches = [module for module in modules if re.fullmatch(rf"(.*\.)?({target})", module)]
        if not matches:
            kinds = sorted({re.sub(r"^.*\.\d+\.", "", module) for module in modules})
            raise ValueError(f"LoRA: target {target!r} matches no matrix; each layer has {', '.join(kinds)}")
        found.update(matches)
    return tuple(module for module in modules if module in found)


def _save(directory: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(directory / "adapter_config.json", config)
