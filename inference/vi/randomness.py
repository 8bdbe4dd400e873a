"""Randomness inside an objective besides its guide's, such as that of estimated densities: its keys, and the scores it
leaves."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

from latentrace.ppl.errors import SiteError

Array = jax.Array


class Inner:
    """What is drawn while one expectation's function is traced."""

    def __init__(self, rng_key: Array, sample: Array):
        self.rng_key, self.sample, self.count = rng_key, sample, 0
        self.scores: list[Array] = []
        """float32[] each, nats: log densities of values that were drawn without reparameterisation"""

    def next_key(self) -> Array:
        self.count += 1
        ours = jax.random.fold_in(self.rng_key, 0xFFFFFFFE)  # traces are numbered from 0 on
        return jax.random.fold_in(jax.random.fold_in(ours, self.sample), self.count)


_current: ContextVar[Inner | None] = ContextVar("inner", default=None)


@contextmanager
def inner_randomness(rng_key: Array, sample: Array) -> Iterator[Inner]:
    """Where randomness may be drawn, for one sample of an expectation."""
    inner = Inner(rng_key, sample)
    token = _current.set(inner)
    try:
        yield inner
    finally:
        _current.reset(token)


def current(what: str) -> Inner:
    """The randomness of the expectation that is being traced."""
    inner = _current.get()
    if inner is None:
        raise SiteError(f"{what} is estimated, which takes randomness: ask for it inside the function of a vi.expectation")
    return inner
