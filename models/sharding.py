"""Where weights lie on several devices.

Under `jax.set_mesh(mesh)`, with mesh axes named "particles" and "model", loaded matrices are split over "model" by heads,
by inner units, and by vocabulary (tensor parallelism), and inference splits particles over "particles":

    with jax.set_mesh(models.make_mesh(particles=4, model=2)):
        lm = models.load(directory)
        posterior = inference.SMC(64).run(rng_key, program, lm)

The compiler inserts the communication, so results are those of one device, up to rounding.
"""

from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PARTICLES, MODEL = "particles", "model"


def make_mesh(particles: int = 1, model: int = 1) -> Mesh:
    """A mesh of `particles` times `model` of the available devices, for `jax.set_mesh`."""
    return jax.make_mesh((particles, model), (PARTICLES, MODEL), axis_types=(AxisType.Auto,) * 2)


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
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError("the mesh has explicit axes; make it with models.make_mesh, or with axis_types of AxisType.Auto")
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
