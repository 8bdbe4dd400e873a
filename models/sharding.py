"""Where weights lie on several devices.

Under `jax.set_mesh(mesh)`, with mesh axes named "particles" and "model", loaded matrices are split over "model" by heads,
by inner units, and by vocabulary (tensor parallelism), and inference splits particles over "particles":

    mesh = jax.make_mesh((4, 2), ("particles", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        lm = models.load(directory)
        posterior = inference.SMC(64).run(rng_key, program, lm)

Axes may be left out. The compiler inserts the communication, so results are those of one device, up to rounding.
"""

from dataclasses import replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

MODEL = "model"


def split_axis(path: tuple[Any, ...], ndim: int) -> int | None:
    """Which axis of a weight is split over the devices of "model"; None: every device has all of it."""
    module, leaf = ("", path[0]) if len(path) == 1 else (path[-2], path[-1])
    if module == "qkv":
        return 0  # key-value heads
    if module == "up":
        return 1  # inner units
    if module in {"out", "down"} and leaf == "kernel":
        return ndim - 1  # their inputs: heads, inner units
    return 0 if leaf in {"embedding", "head"} else None


def place(path: tuple[Any, ...], value: Any) -> jax.Array:
    """A weight on the devices of the current mesh; without a mesh, on the default device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.numpy.asarray(value)
    axis, devices = split_axis(path, value.ndim), mesh.shape.get(MODEL, 1)
    spec = [None] * value.ndim
    if axis is not None and value.shape[axis] % devices == 0 and devices > 1:
        spec[axis] = MODEL  # type: ignore[call-overload]
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))


def shard(lm: Any) -> Any:
    """A `TransformerLM`'s weights placed on the current mesh, as `load` places them."""
    key = lambda part: getattr(part, "key", getattr(part, "idx", part))
    placed = jax.tree_util.tree_map_with_path(lambda path, x: place(tuple(map(key, path)), x), lm.weights)
    return replace(lm, weights=placed)
