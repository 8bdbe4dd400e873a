"""What many particles, or chains, carry from one compiled call to the next: what they share stays shared."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from .collectives import PARTICLES, over_axis_from, shapes_over_axis_from

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Boundary:
    """What all particles carry."""

    leaves: list[Array]
    tree: Any = field(metadata={"static": True})
    axes: tuple[int | None, ...] = field(metadata={"static": True})
    """0 for leaves with a leading axis of particles, None for those that particles share"""

    @staticmethod
    def nothing() -> "Boundary":
        return Boundary([], jax.tree.structure(None), ())

    @staticmethod
    def of(tree: Any) -> "Boundary":
        """Arrays with a leading axis of particles."""
        leaves, structure = jax.tree.flatten(tree)
        return Boundary(leaves, structure, (0,) * len(leaves))

    def value(self) -> Any:
        """The leaves in their places."""
        return self.tree.unflatten(self.leaves)

    def whole(self, size: int) -> Any:
        """The same, every leaf with a leading axis of so many particles."""
        return self.widened((0,) * len(self.leaves), size).value()

    def widened(self, axes: tuple[int | None, ...], size: int) -> "Boundary":
        """The same, where leaves that `axes` gives to each particle are no longer shared."""
        repeat = lambda x: jnp.broadcast_to(x[None], (size, *x.shape))
        wide = [repeat(x) if a == 0 and b is None else x for x, a, b in zip(self.leaves, axes, self.axes)]
        return replace(self, leaves=wide, axes=tuple(0 if 0 in (a, b) else None for a, b in zip(axes, self.axes)))


def over(boundary: Boundary, fn: Callable[..., Any], *more: Any, size: int, axis: str = PARTICLES) -> Boundary:
    """`fn` of what each particle carries, and of `more`: other boundaries, or arrays with a leading axis of particles."""
    trees: list[Any] = []
    parts = [boundary, *[x if isinstance(x, Boundary) else Boundary.of(x) for x in more]]
    ends = [0, *itertools.accumulate(len(part.leaves) for part in parts)]

    def one_particle(*leaves: Array) -> list[Array]:
        values = [part.tree.unflatten(leaves[a:b]) for part, (a, b) in zip(parts, itertools.pairwise(ends))]
        out, tree = jax.tree.flatten(fn(*values))
        trees[:] = [tree]
        return out

    inputs = [x for part in parts for x in part.leaves]
    axes = tuple(a for part in parts for a in part.axes)
    leaves, axes = over_axis_from(one_particle, size, inputs, axes, axis)
    return Boundary(leaves, trees[0], axes)


def settled(boundary: Boundary, fn: Callable[[Any], tuple[Any, Any]], *, size: int, axis: str) -> tuple[Boundary, Any]:
    """A boundary that `fn`, which gives what is carried next and something else, leaves of one kind: what it makes different
    between particles is so from the first time on. And zeros like the something else, with a leading axis of particles."""
    trees: list[Any] = []

    def one_particle(*leaves: Array) -> list[Array]:
        after, found = fn(boundary.tree.unflatten(leaves))
        trees[:] = [jax.tree.structure(found)]
        return [*jax.tree.leaves(after), *jax.tree.leaves(found)]

    while True:
        shapes, axes = shapes_over_axis_from(one_particle, size, boundary.leaves, boundary.axes, axis)
        count = len(boundary.leaves)
        wide = boundary.widened(axes[:count], size)
        if wide.axes == boundary.axes:
            return boundary, trees[0].unflatten(jnp.zeros(x.shape, x.dtype) for x in shapes[count:])
        boundary = wide


def advance(boundary: Boundary, fn: Callable[[Any], tuple[Any, Any]], *, size: int, axis: str) -> tuple[Boundary, Any]:
    """What `fn` leaves of a boundary that is `settled` for it, and the something else with a leading axis of particles."""

    def one_particle(*leaves: Array) -> tuple[list[Array], Any]:
        after, found = fn(boundary.tree.unflatten(leaves))
        return jax.tree.leaves(after), found

    mapped = jax.vmap(one_particle, in_axes=boundary.axes, out_axes=(list(boundary.axes), 0), axis_name=axis, axis_size=size)
    leaves, found = mapped(*boundary.leaves)
    return replace(boundary, leaves=leaves), found


def parted(both: Boundary, size: int) -> tuple[Boundary, Any]:
    """Of a pair, the first as a boundary; the second with a leading axis of particles."""
    first, tree = jax.tree.flatten(both.value()[0])
    return Boundary(first, tree, both.axes[: len(first)]), both.whole(size)[1]
