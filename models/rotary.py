"""Rotary positions: each pair of a head's coordinates turns by an angle proportional to the token's position.

Rescalings stretch a trained context. Each maps the frequencies float64[dim / 2] (radians per token) of the plain rule
to its own, and may scale cosines and sines by a constant.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from latentrace.ppl.language_model import Array


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor`."""

    rope_type: ClassVar[str] = "linear"
    factor: float
    attention_factor: ClassVar[float] = 1.0

    def rescale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        return frequencies / self.factor


@dataclass(frozen=True)
class Dynamic:
    """NTK-aware scaling that sets in beyond the trained length, up to which positions are left as they are.

    Beyond it, the distribution of a token would depend on how many tokens follow it in a pass, so that a text has no
    density. Contexts therefore end at the trained length.
    """

    rope_type: ClassVar[str] = "dynamic"
    factor: float
    attention_factor: ClassVar[float] = 1.0

    def rescale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        return frequencies


@dataclass(frozen=True)
class Llama3:
    """Slow frequencies divided by `factor`, fast ones kept, a linear blend in between (Llama 3.1)."""

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: ClassVar[float] = 1.0

    def rescale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        turns = self.original_max_position_embeddings * frequencies / (2 * np.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclass(frozen=True)
class Yarn:
    """Frequencies of fewer than `beta_slow` turns in the trained length divided by `factor`, those of more than
    `beta_fast` kept, with a ramp over their index in between (arXiv:2309.00071, section 3.2)."""

    rope_type: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def rescale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        dim = 2 * len(frequencies)

        def index_of(turns: float) -> float:  # of the frequency that turns so often in the trained length
            length = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(length) / (2 * math.log(theta))

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        divided = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return divided * frequencies / self.factor + (1 - divided) * frequencies


@dataclass(frozen=True)
class LongRope:
    """Each frequency divided by a number of its own (Phi-3): the short ones or, for contexts longer than trained on at
    first, the long ones. Which of them is fixed when the model is loaded, so that texts have one density."""

    rope_type: ClassVar[str] = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float
    original_max_position_embeddings: int
    long: bool = False

    def rescale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        return frequencies / np.asarray(self.long_factor if self.long else self.short_factor)


Scaling = Linear | Dynamic | Llama3 | Yarn | LongRope


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one kind of layer."""

    theta: float = 10000.0
    fraction: float = 1.0
    """How much of each head turns; the rest of its coordinates have no position."""
    scaling: Scaling | None = None

    def angles(self, head_dim: int, positions: Array) -> tuple[Array, Array]:
        """Cosines and sines float32[T, dim / 2] at positions int32[T], where dim = fraction * head_dim."""
        dim, factor = int(head_dim * self.fraction), 1.0
        frequencies = self.theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
        if self.scaling is not None:
            frequencies, factor = self.scaling.rescale(frequencies, self.theta), self.scaling.attention_factor
        angles = positions[:, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
        return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotate [..., T, head_dim] by position; the two halves of the turning part are the pairs (Hugging Face's layout)."""
    cos, sin = angles
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
