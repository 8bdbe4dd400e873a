"""Values of continuous sites as points of R^n: NumPyro's bijections onto supports, applied where the sites stand.

A support may depend on other random values, as that of Uniform(0, theta) does, so only the walk through a program knows it.
Given values of these two kinds ask for it there; they may have leading axes for loops and plates like any other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to

Array = jax.Array


class Point(NamedTuple):
    """A given value as the point that NumPyro's bijection takes to it. The site pays the density of the point."""

    point: Array


class PointOf(NamedTuple):
    """A given value whose point the trace records in its place."""

    value: Array


def constrained(dist: Any, point: Array) -> tuple[Array, Array]:
    """The value at a point, and the log Jacobian of the way there, float32[]."""
    bijection = biject_to(dist.support)
    value = bijection(point)
    return value, jnp.sum(bijection.log_abs_det_jacobian(point, value)).astype(jnp.float32)


def point_at(dist: Any, value: Array) -> Array:
    """The point of a value. One that rounding has put on the edge of its support has the point of a value close to it."""
    about = np.finfo(np.float32)
    low, high = np.log(about.tiny) + 1, -np.log(about.eps)
    return jnp.nan_to_num(biject_to(dist.support).inv(value), nan=0.0, neginf=low, posinf=high)


def point_shape(tree: Any, leaves: Any, shape: tuple[int, ...], dtype: Any) -> tuple[int, ...] | None:
    """The shape of points of a distribution, from its structure and the shapes of its leaves; None for a discrete one.

    `NotImplementedError` where NumPyro knows no bijection onto its support.
    """

    def point(leaves: Any) -> Array | None:
        dist = tree.unflatten(leaves)
        return None if dist.support.is_discrete else point_at(dist, jnp.zeros(shape, dtype))

    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    found = jax.eval_shape(point, leaves)
    return None if found is None else found.shape
