"""Proposals for the values of `sample` sites: new values, and the log ratio of the way back to the way there."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from latentrace.ppl.errors import SiteError

Array = jax.Array


class ValueProposal(Protocol):
    """Hashable: it is compiled in."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose values it changes."""
        ...

    def propose(self, rng_key: Array, values: dict[str, Array]) -> tuple[dict[str, Array], Array]:
        """New values of those sites, and log q(old | new) - log q(new | old), float32[], nats."""
        ...


class RandomWalk:
    """Normal steps of a standard deviation for each site; a value outside the support is rejected.

    >>> RandomWalk(theta=0.3)
    RandomWalk(theta=0.3)
    """

    def __init__(self, **scales: float):
        if not scales:
            raise SiteError(f"{type(self).__name__}: name at least one site and its step, as in theta=0.3")
        if wrong := [name for name, scale in scales.items() if not scale > 0]:
            raise SiteError(f"{type(self).__name__}: the step of {wrong[0]!r} must be positive, not {scales[wrong[0]]}")
        self.scales = tuple(sorted(scales.items()))

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.scales)

    def propose(self, rng_key: Array, values: dict[str, Array]) -> tuple[dict[str, Array], Array]:
        keys = jax.random.split(rng_key, len(self.scales))
        moved = {name: values[name] + _steps(key, scale, values[name]) for key, (name, scale) in zip(keys, self.scales)}
        return moved, jnp.float32(0)

    def __eq__(self, other: Any) -> bool:
        return type(self) is type(other) and self.scales == other.scales

    def __hash__(self) -> int:
        return hash((type(self), self.scales))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={scale}' for name, scale in self.scales)})"


class LogRandomWalk(RandomWalk):
    """Normal steps of the logarithms of positive values."""

    def propose(self, rng_key: Array, values: dict[str, Array]) -> tuple[dict[str, Array], Array]:
        keys = jax.random.split(rng_key, len(self.scales))
        steps = {name: _steps(key, scale, values[name]) for key, (name, scale) in zip(keys, self.scales)}
        moved = {name: values[name] * jnp.exp(step) for name, step in steps.items()}
        # q(new | old) has the Jacobian 1 / new
        return moved, jnp.asarray(sum(step.sum() for step in steps.values()), jnp.float32)


def _steps(rng_key: Array, scale: float, value: Array) -> Array:
    """Normal steps for one value; `SiteError` where it is no float."""
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise SiteError(f"a random walk needs floats, found a site of {jnp.result_type(value)}; write a proposal for it")
    return scale * jax.random.normal(rng_key, jnp.shape(value), jnp.result_type(value))
