"""A process reward: the probability that a text which has come this far ends right, read from the model's own features."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

from latentrace.models.errors import CheckpointError
from latentrace.models.loading import SHIPPED

Array = jax.Array
FILE = "process_reward.safetensors"
HIDDEN = 512
"""Units of an untrained reward; training joins several."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ProcessReward:
    """A perceptron with one hidden layer on features of a language model: a pytree of weights.

    It reads `ppl.features(context)` at the end of a line, which the model computes anyway to go on: no pass of its own.

        line, context = ppl.generate("line", context, until="\\n", max_tokens=12)
        ppl.twist("promise", reward.log_prob(ppl.features(context)))
    """

    mean: Array
    """float32[D]: mean of the features in training"""
    scale: Array
    """float32[D]: their standard deviation"""
    inner: Array
    """float32[H, D]"""
    bias: Array
    """float32[H]"""
    outer: Array
    """float32[H]"""
    offset: Array
    """float32[]"""

    def logit(self, features: Array) -> Array:
        """log odds float32[...] that a text of these features [..., D] ends right."""
        x = (features - self.mean) / self.scale
        return jax.nn.relu(x @ self.inner.T + self.bias) @ self.outer + self.offset

    def log_prob(self, features: Array) -> Array:
        """log probability float32[...] in nats, at most 0."""
        return jax.nn.log_sigmoid(self.logit(features))

    def probability(self, features: Array) -> Array:
        """Probability float32[...]."""
        return jax.nn.sigmoid(self.logit(features))

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors."""
        save_file({name: np.array(value) for name, value in vars(self).items()}, path)


def load_process_reward(path: str | Path = SHIPPED["reasoner"] / FILE) -> ProcessReward:
    """The shipped reasoner's process reward, or another one that `save` wrote.

    Raises `CheckpointError` where the file is missing, broken, or holds something else.
    """
    try:
        arrays = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as a process reward ({error})") from error
    expected = set(ProcessReward.__dataclass_fields__)
    if set(arrays) != expected:
        raise CheckpointError(f"{path}: expected the tensors {sorted(expected)}, found {sorted(arrays)}")
    hidden, size = arrays["inner"].shape if arrays["inner"].ndim == 2 else (-1, -1)
    shapes = {"mean": (size,), "scale": (size,), "inner": (hidden, size), "bias": (hidden,), "outer": (hidden,), "offset": ()}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise CheckpointError(f"{path}: tensor {name!r} has shape {arrays[name].shape}, expected {shape}")
    return ProcessReward(**{name: jnp.asarray(value) for name, value in arrays.items()})


def initial_reward(features: np.ndarray, rng_key: Array) -> ProcessReward:
    """An untrained reward for features like float32[N, D]."""
    size = features.shape[1]
    inner = jax.random.normal(rng_key, (HIDDEN, size)) * size**-0.5
    zeros, mean, scale = jnp.zeros(HIDDEN), features.mean(0), features.std(0) + 1e-6
    return ProcessReward(jnp.asarray(mean), jnp.asarray(scale), inner, zeros, zeros, jnp.float32(0))
