"""Rotary positions: each pair of a head's coordinates turns by an angle proportional to the token's position."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from latentrace.ppl.language_model import Array


@dataclass(frozen=True)
class RopeScaling:
    """The rescaled rotary frequencies of Llama 3.1 and later."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int


def rotary_angles(
    head_dim: int, theta: float, scaling: RopeScaling | None, position: Array, length: int
) -> tuple[Array, Array]:
    """Cosines and sines float32[length, head_dim / 2] for the positions from `position` on."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        frequencies = _rescaled(frequencies, scaling)
    positions = (position + jnp.arange(length)).astype(jnp.float32)
    angles = positions[:, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def _rescaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3's rule: slow frequencies divided by `factor`, fast ones kept, a linear blend in between."""
    turns = scaling.original_max_length * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotate [..., T, head_dim] by position; the two halves of head_dim are the pairs (Hugging Face's layout)."""
    cos, sin = angles
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
