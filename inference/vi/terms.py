"""Sums of log densities whose terms know on which random choices they may depend."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["nats", "by_choice"], meta_fields=[])
@dataclass(frozen=True)
class LogDensity:
    """A sum of log densities. It may be added to, subtracted from and scaled by numbers; for anything else read `nats`.

    As long as it is no more than that, a choice of a guide is charged for what may depend on it alone.
    """

    nats: Array
    """float32[], or with a leading axis of traces"""
    by_choice: Array | None = None
    """float32[..., M + 1]: its terms, constants to differentiation, by the latest of the trace's M choices that they may depend
    on, slot 0 being for none; None where nobody asks"""

    def __add__(self, other: Any) -> "LogDensity":
        other = other if isinstance(other, LogDensity) else LogDensity(jnp.asarray(other, jnp.float32))
        return LogDensity(self.nats + other.nats, _added(self, other))

    def __mul__(self, factor: float) -> "LogDensity":
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return LogDensity(self.nats * factor, None if self.by_choice is None else self.by_choice * factor)

    def __neg__(self) -> "LogDensity":
        return self * -1.0

    def __sub__(self, other: Any) -> "LogDensity":
        return self + -1.0 * other

    def __rsub__(self, other: Any) -> "LogDensity":
        return -self + other

    __radd__, __rmul__ = __add__, __mul__

    def to_go(self) -> Array | None:
        """float32[..., M]: for each choice the sum of the terms that may depend on it; None where unknown."""
        if self.by_choice is None:
            return None
        return jnp.cumsum(self.by_choice[..., ::-1], axis=-1)[..., ::-1][..., 1:]


def _added(one: LogDensity, other: LogDensity) -> Array | None:
    """Terms of both. A sum that does not know may depend on every choice."""
    if one.by_choice is None or other.by_choice is None:
        known, unknown = (one, other) if other.by_choice is None else (other, one)
        if known.by_choice is None:
            return None
        return known.by_choice.at[..., -1].add(jax.lax.stop_gradient(unknown.nats))
    return one.by_choice + other.by_choice
