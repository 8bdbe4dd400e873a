"""One update of parameters, staged: minibatch, gradient, optimizer, and what is not finite; and many of them, compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from latentrace.ppl.errors import SiteError
from latentrace.ppl.jaxpr import body_of, consts_of, structural_key
from latentrace.ppl.run import compiled
from latentrace.ppl.sites import flatten, hoist

from ..anytime import plain

Array = jax.Array

LONGEST = 1024
"""most updates between two looks of the host"""


class Shardings(NamedTuple):
    """Where parameters and batches lie on a mesh of devices: a `jax.sharding.NamedSharding` for all arrays, or a tree of them
    that begins like theirs."""

    params: Any
    batch: Any


class How(NamedTuple):
    """What a step of training depends on besides its numbers."""

    loss: Callable[..., Any]
    optimizer: optax.GradientTransformation
    batch_size: int | None
    accumulate: int
    dtype: Any
    """of parameters as the loss sees them; None as they are"""
    batch_sharding: Any = None


class State(NamedTuple):
    """What an update changes."""

    params: Any
    opt_state: Any


class Said(NamedTuple):
    """What an update says."""

    loss: Array
    """float32[]"""
    stats: dict[str, Array]
    bad: Any
    """bool[1 + P]: whether the loss, and the gradient or the new value of each array of parameters, is not finite. Where one
    is, nothing was changed."""


class Keys(NamedTuple):
    """The keys of a run."""

    loss: Array
    order: Array
    """of shuffled data"""
    rows: Array
    """of data that a function gives"""

    @classmethod
    def of(cls, rng_key: Array) -> "Keys":
        return cls(*jax.random.split(rng_key, 3))


# --- minibatches ------------------------------------------------------------------------------------------------------


def num_rows(data: Any) -> int:
    """The leading axis that all arrays of some data have in common; `SiteError` where they do not."""
    sizes = {jax.tree_util.keystr(path): jnp.shape(x)[:1] for path, x in jax.tree.leaves_with_path(data)}
    if not sizes or () in sizes.values() or len(set(sizes.values())) > 1:
        found = ", ".join(f"data{path} {list(size)}" for path, size in sizes.items()) or "no arrays"
        raise SiteError(f"fit: the arrays of data must have one leading axis in common, that of examples; found {found}")
    return int(next(iter(sizes.values()))[0])


def shuffled(keys: Keys, step: Array, rows: int, batch_size: int) -> Array:
    """int32[rows]: the order in which the epoch of a step goes through the data."""
    epoch = step // (rows // batch_size)
    return jax.random.permutation(jax.random.fold_in(keys.order, epoch), rows)


_shuffled = jax.jit(shuffled, static_argnums=(2, 3))


def batch_of(data: Any, order: Array, step: Array | int, batch_size: int) -> Any:
    """The minibatch of a step, whose epoch has this order; what is left of an epoch is left out."""
    begin = step % (order.shape[0] // batch_size) * batch_size
    rows = jax.lax.dynamic_slice_in_dim(order, begin, batch_size)
    return jax.tree.map(lambda x: x[rows], data)


# --- one update -------------------------------------------------------------------------------------------------------


def gradient(how: How, params: Any, rng_key: Array, batch: tuple[Any, ...]) -> tuple[tuple[Array, dict[str, Array]], Any]:
    """Loss and stats, and the loss's gradient, float32 like the parameters; means over `accumulate` parts of the batch."""

    def objective(params: Any, rng_key: Array, batch: tuple[Any, ...]) -> tuple[Array, dict[str, Array]]:
        if how.dtype is not None:
            params = jax.tree.map(lambda x: x.astype(how.dtype), params)
        return checked(how.loss(rng_key, params, *batch))

    one = jax.value_and_grad(objective, has_aux=True)
    if how.accumulate == 1:
        return one(params, rng_key, batch)
    parts = parts_of(how, batch)
    inputs = jax.random.split(rng_key, how.accumulate), parts
    first = jax.tree.map(lambda x: x[0], parts)
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, params, rng_key, first))
    add = lambda total, part: (jax.tree.map(jnp.add, total, one(params, *part)), None)
    return jax.tree.map(lambda x: x / how.accumulate, jax.lax.scan(add, total, inputs)[0])  # type: ignore[no-any-return]


def parts_of(how: How, batch: Any) -> Any:
    """A batch with a leading axis of its parts."""
    return jax.tree.map(lambda x: x.reshape(how.accumulate, -1, *x.shape[1:]), batch)


def checked(found: Any) -> tuple[Array, dict[str, Array]]:
    """What a loss returned, as float32[] and a dictionary of them."""
    loss, stats = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
    floats = lambda x: jnp.shape(x) == () and jnp.issubdtype(jnp.result_type(x), jnp.floating)
    if isinstance(loss, (tuple, list, dict)) or not floats(loss):
        raise SiteError(f"fit: the loss must return float32[], or that and a dictionary of float32[], found {described(found)}")
    if not isinstance(stats, dict) or not all(jnp.shape(x) == () for x in stats.values()):
        raise SiteError(f"fit: the stats beside the loss must be a dictionary of float32[], found {described(stats)}")
    return jnp.float32(loss), {name: jax.lax.stop_gradient(jnp.float32(x)) for name, x in stats.items()}


def described(tree: Any) -> str:
    return str(jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)).replace("'", "")


def update(how: How, rng_key: Array, state: State, batch: tuple[Any, ...]) -> tuple[State, Said]:
    """One step of the optimizer along the loss's gradient; none where something is not finite."""
    if how.batch_sharding is not None:
        batch = jax.lax.with_sharding_constraint(batch, (how.batch_sharding,))
    (loss, stats), gradients = gradient(how, state.params, rng_key, batch)
    optimizer = optax.with_extra_args_support(how.optimizer)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, value=loss)  # some look at the loss
    params = optax.apply_updates(state.params, updates)
    finite = lambda x: jnp.isfinite(x).all()
    good = [finite(g) & finite(p) for g, p in zip(jax.tree.leaves(gradients), jax.tree.leaves(params))]
    bad = ~jnp.stack([finite(loss), *good])
    # an optimizer's state may hold other dtypes than it began with, and a loop's may not
    keep = lambda new, old: jnp.where(bad.any(), old, jnp.asarray(new).astype(old.dtype))
    return jax.tree.map(keep, State(params, opt_state), state), Said(loss, stats, bad)


# --- many updates -----------------------------------------------------------------------------------------------------


class Stretch:
    """Updates in one compiled call, for any data of the same shapes: `run(state, data, first, count)`.

    The loss and the optimizer are staged, and what they close over, such as the weights of a model, becomes inputs of what is
    compiled: another `Stretch` of the same structure compiles nothing, though its functions be other objects.
    """

    def __init__(self, how: How, keys: Keys, state: State, data: tuple[Any, ...]):
        self.keys, self.size, self.rows = keys, how.batch_size, num_rows(data) if how.batch_size else 0
        self.order: Array | None = None  # of the epoch in which step number `next` lies
        self.next, size, rows, where = 0, self.size, self.rows, places(state)
        batch = jax.eval_shape(lambda data: batch_of(data, jnp.arange(rows), 0, size) if size else data, data)
        closed, self.consts, tree = hoist(lambda *args: update(how, *args), keys.loss, state, batch)
        jaxpr = self.jaxpr = body_of(closed)

        def staged(consts: list[Any], *args: Any) -> tuple[State, Said]:
            return tree.unflatten(jax.core.eval_jaxpr(jaxpr, consts_of(closed), *consts, *jax.tree.leaves(args)))  # type: ignore[no-any-return]

        key = (structural_key(closed), size, rows, jax.tree.structure((state, data)), where)
        self.call = compiled(key, lambda: stretch(staged, size, rows, where), donate=(1, 6))

    def text(self) -> str:
        """The staged update, the same in every process."""
        return plain(self.jaxpr)

    def run(self, state: State, data: tuple[Any, ...], first: int, count: int) -> tuple[State, Said, int]:
        """Up to `count` updates from number `first` on, fewer where one is not finite, which is the last then.

        Returns the state, losses and stats on a leading axis of `LONGEST`, `Said.bad` of the last update, and how many there
        were. The state given is used up.
        """
        numbers, none = (jnp.int32(first), jnp.int32(count)), jnp.zeros(0, jnp.int32)
        if self.order is None or self.next != first:
            self.order = _shuffled(self.keys, numbers[0], self.rows, self.size) if self.size else none
        state, said, done, self.order = self.call(self.consts, state, data, self.keys, *numbers, self.order)
        self.next = first + int(done)
        return state, said, int(done)


def stretch(staged: Callable[..., tuple[State, Said]], batch_size: int | None, rows: int, where: Any) -> Callable[..., Any]:
    """The function that is compiled; it holds on to no arrays."""

    def one(consts: Any, batch: Any, keys: Keys, step: Array, state: State) -> tuple[State, Said]:
        state, said = staged(consts, jax.random.fold_in(keys.loss, step), state, batch)
        if where is not None:
            leaves, tree = flatten(state)
            kept = [x if at is None else jax.lax.with_sharding_constraint(x, at) for x, at in zip(leaves, where)]
            state = tree.unflatten(kept)
        return state, said

    def run(consts: Any, state: State, data: Any, keys: Keys, first: Array, count: Array, order: Array) -> Any:
        each = rows // batch_size if batch_size else 0

        def epoch(loop: Any) -> Any:
            """The steps up to the end of an epoch: its order is no part of the inner loop's carry, which would copy it."""
            k, state, said, order = loop
            end, batch = count, lambda step: data
            if batch_size:
                new = lambda: shuffled(keys, first + k, rows, batch_size)
                order = jax.lax.cond((first + k) % each == 0, new, lambda: order)
                end = jnp.minimum(count, ((first + k) // each + 1) * each - first)
                batch = lambda step: batch_of(data, order, step, batch_size)

            def step(loop: Any) -> Any:
                k, state, said = loop
                state, now = one(consts, batch(first + k), keys, first + k, state)
                put = lambda place, x: place.at[k].set(x)
                said = jax.tree.map(put, said._replace(bad=None), now._replace(bad=None))._replace(bad=now.bad)
                return k + 1, state, said

            inside = lambda loop: (loop[0] < end) & ~loop[2].bad.any()
            return *jax.lax.while_loop(inside, step, (k, state, said)), order

        example = batch_of(data, order, first, batch_size) if batch_size else data
        shape = jax.eval_shape(one, consts, example, keys, first, state)[1]
        blank = jax.tree.map(lambda x: jnp.zeros((LONGEST, *x.shape), x.dtype), shape._replace(bad=None))
        start = jnp.int32(0), state, blank._replace(bad=jnp.zeros(shape.bad.shape, bool)), order
        going = lambda loop: (loop[0] < count) & ~loop[2].bad.any()
        done, state, said, order = jax.lax.while_loop(going, epoch, start)
        return state, said, done, order

    return run


def places(state: State) -> tuple[Any, ...] | None:
    """Where each array lies, if some lie on several devices."""
    on_mesh = lambda x: len(x.sharding.device_set) > 1
    leaves = jax.tree.leaves(state)
    return tuple(x.sharding if on_mesh(x) else None for x in leaves) if any(map(on_mesh, leaves)) else None
