"""What particles know of each other: every collective of the library, over named vmapped axes.

A particle is written alone and run under `jax.vmap(..., axis_name=PARTICLES)`. Plates add axes of their own. Under a mesh
of devices with an axis named "particles", particles are split over it, and the compiler inserts the communication.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import batching

Array = jax.Array

PARTICLES = "particles"
PROBLEMS = "problems"
"""the axis of several runs side by side, such as chains, outside that of each one's particles"""


def over_problems(one_problem: Any, in_axes: Any) -> Any:
    """`one_problem` for several problems at once; results get a leading axis of problems."""
    return jax.vmap(one_problem, in_axes=in_axes, axis_name=PROBLEMS)


def over_particles(one_particle: Any, num_particles: int) -> Any:
    """The results of `one_particle()` for all particles, on a new leading axis."""
    return _mapped(lambda _: one_particle(), num_particles)(jnp.zeros(num_particles))


def over_axis_from(
    one_particle: Any, size: int, leaves: list[Array], axes: tuple[int | None, ...], axis: str = PARTICLES
) -> tuple:
    """The results of `one_particle(*leaves)`, a list of arrays, and the axis of each: None where all particles share it, 0
    where particles have their own.

    `axes` says the same of the inputs. What is shared, such as a prompt's cache, is never copied.
    """
    _, found = shapes_over_axis_from(one_particle, size, leaves, axes, axis)
    one = lambda _, *values: [jnp.asarray(x) for x in one_particle(*values)]
    return _mapped(one, size, axis, in_axes=(0, *axes), out_axes=list(found))(jnp.zeros(size), *leaves), found


def shapes_over_axis_from(
    one_particle: Any, size: int, leaves: list[Array], axes: tuple[int | None, ...], axis: str = PARTICLES
) -> tuple:
    """The shapes and dtypes of the results, all with a leading axis of particles, and the axis of each; nothing is computed."""
    found: list[int | None] = []

    def watched(_: Array, *values: Array) -> list[Array]:
        out = [jnp.asarray(x) for x in one_particle(*values)]
        found[:] = [0 if differs(x, axis) else None for x in out]
        return out

    shapes = jax.eval_shape(_mapped(watched, size, axis, in_axes=(0, *axes)), jnp.zeros(size), *leaves)
    return shapes, tuple(found)


def differs(x: Array, axis: str = PARTICLES) -> bool:
    """Whether particles have values of their own of something that is being traced over them."""
    noted: list[bool] = []
    differs_p.bind(x, note=lambda: noted.append(True), axis=axis)
    return bool(noted)


differs_p = core.Primitive("differs")
differs_p.def_abstract_eval(lambda x, note, axis: x)


def _batch_differs(axis_data: Any, args: Any, dims: Any, note: Any, axis: str) -> Any:
    if axis_data.name == axis:
        if dims[0] is not None:
            note()
        return args[0], dims[0]
    return differs_p.bind(args[0], note=note, axis=axis), dims[0]


batching.fancy_primitive_batchers[differs_p] = _batch_differs


def _mapped(fn: Any, num_particles: int, axis: str = PARTICLES, **axes: Any) -> Any:
    """`fn` over an axis; a mesh may split that of particles."""
    mesh = jax.sharding.get_abstract_mesh()
    if axis != PARTICLES or PARTICLES not in mesh.axis_names:
        return jax.vmap(fn, axis_name=axis, **axes)
    devices = mesh.shape[PARTICLES]
    if num_particles % devices:
        raise ValueError(
            f"num_particles={num_particles} is not a multiple of the {devices} devices of the mesh's particles axis"
        )
    return jax.vmap(lambda *x: spread(fn(*x)), axis_name=PARTICLES, spmd_axis_name=PARTICLES, **axes)


def spread(tree: Any) -> Any:
    """The same arrays of this particle, kept on its own device where there is a mesh with an axis for particles."""
    if PARTICLES not in jax.sharding.get_abstract_mesh().axis_names:
        return tree
    free = lambda x: jax.sharding.PartitionSpec(*[jax.sharding.PartitionSpec.UNCONSTRAINED] * x.ndim)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, free(x)), tree)


def index(axis: str = PARTICLES) -> Array:
    """int32[]: which particle this is, or which element of another axis."""
    return jax.lax.axis_index(axis)


def anybody(flag: Array, axes: Sequence[str] = (PARTICLES,)) -> Array:
    """bool[], the same for all particles: whether `flag` holds for one of them."""
    return jax.lax.psum(flag.astype(jnp.int32), tuple(axes)) > 0 if axes else flag


def total(x: Array, axes: Sequence[str] = (PARTICLES,)) -> Array:
    return jax.lax.psum(x, tuple(axes))


def gather(x: Array, axis: str = PARTICLES) -> Array:
    """The values of all particles, or of all elements of another axis, on a new leading axis."""
    return jax.lax.all_gather(x, axis)


def reindex(tree: Any, ancestor: Array) -> Any:
    """Every leaf as particle number `ancestor` has it; leaves that do not differ between particles stay untouched.

    The axis is that of the population that resamples: the innermost one along which `ancestor` differs.
    """
    return jax.tree.map(lambda x: reindex_p.bind(jnp.asarray(x), ancestor), tree)


reindex_p = core.Primitive("reindex")
reindex_p.def_abstract_eval(lambda x, ancestor: jax.core.ShapedArray(x.shape, x.dtype))


def _batch_reindex(axis_data: Any, args: Any, dims: Any) -> Any:
    (x, ancestor), (x_dim, ancestor_dim) = args, dims
    if ancestor_dim is None:  # an axis within the population's (a plate): each element moves alike
        return reindex_p.bind(x, ancestor), x_dim
    if x_dim is None:  # shared by the population: nothing to move
        return x, None
    return jnp.take(x, ancestor, axis=x_dim, mode="clip"), x_dim


batching.fancy_primitive_batchers[reindex_p] = _batch_reindex


def move(due: Array, tree: Any, ancestor: Array) -> Any:
    """The same as `reindex` where `due`, bool[], the same for all particles; else nothing is copied."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, move_p.bind(due, ancestor, *map(jnp.asarray, leaves)))


move_p = core.Primitive("move")
move_p.multiple_results = True
move_p.def_abstract_eval(lambda due, ancestor, *leaves: [jax.core.ShapedArray(x.shape, x.dtype) for x in leaves])


def _batch_move(axis_data: Any, args: Any, dims: Any) -> Any:
    (due, ancestor, *leaves), (_, ancestor_dim, *leaf_dims) = args, dims
    if ancestor_dim is None:  # another axis than the population's: each element moves alike
        return move_p.bind(due, ancestor, *leaves), leaf_dims
    own = [jnp.moveaxis(x, d, 0) for x, d in zip(leaves, leaf_dims) if d is not None]
    moved = iter(_moved(due, ancestor, own))
    return [x if d is None else next(moved) for x, d in zip(leaves, leaf_dims)], [None if d is None else 0 for d in leaf_dims]


batching.fancy_primitive_batchers[move_p] = _batch_move


SMALL = 2**18
"""bytes of a population that are moved sooner than it is found out whether they must be"""


@jax.custom_batching.custom_vmap
def _moved(due: Array, ancestors: Array, leaves: list[Array]) -> list[Array]:
    """Leaves of all particles (leading axis), each as its ancestor has it where `due`."""
    return jax.lax.cond(due, lambda xs: [_taken(x, ancestors) for x in xs], lambda xs: xs, leaves)  # type: ignore[no-any-return]


@_moved.def_vmap
def _moved_populations(count: int, batched: Any, due: Array, ancestors: Array, leaves: list[Array]) -> Any:
    """Of many populations only those that are due are copied, one after the other; small ones all at once."""
    repeat = lambda x, has_axis: jnp.asarray(x) if has_axis else jnp.broadcast_to(x[None], (count, *x.shape))
    due, ancestors, leaves = jax.tree.map(repeat, (due, ancestors, leaves), tuple(batched))
    if sum(x.size * x.dtype.itemsize for x in leaves) < SMALL * count:
        pick = lambda x: jnp.where(due.reshape(-1, *[1] * (x.ndim - 1)), jax.vmap(_taken)(x, ancestors), x)
        return [pick(x) for x in leaves], [True] * len(leaves)
    order = jnp.argsort(~due)

    def one_population(k: Array, leaves: list[Array]) -> list[Array]:
        at = order[k]
        return [x.at[at].set(_taken(x[at], ancestors[at])) for x in leaves]

    return jax.lax.fori_loop(0, due.sum(), one_population, leaves), [True] * len(leaves)


def _taken(x: Array, ancestors: Array) -> Array:
    return jnp.take(x, ancestors, axis=0, mode="clip")
