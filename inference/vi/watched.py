"""Which site of an objective makes it, or its gradient, other than finite."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from latentrace.ppl.sites import NAMED_SITES
from latentrace.ppl.staging import Staged

Array = jax.Array
site: ContextVar[str | None] = ContextVar("site", default=None)
"""the one whose log densities count; None for all"""
_met: ContextVar[list[str] | None] = ContextVar("met", default=None)


def note(staged: Staged) -> None:
    """Keep the names of a program's sites, where somebody asks."""
    met, kinds = _met.get(), {p.name for p in NAMED_SITES}
    if met is not None:
        met.extend(s.name for s in staged.sites.values() if s.kind in kinds and s.name not in met)


class Loss:
    """An objective to be maximised as a loss to be minimised; see `loss`."""

    def __init__(self, objective: Callable[..., Array]):
        self.objective = objective

    def __call__(self, rng_key: Array, *args: Any) -> Array:
        return -self.objective(rng_key, *args)

    def explain(self, rng_key: Array, params: Any, *batch: Any) -> str:
        """Which sites have a log density, or a gradient of it with respect to the parameters, that is not finite."""
        met: list[str] = []
        token = _met.set(met)
        try:
            jax.eval_shape(self.objective, rng_key, params, *batch)
        finally:
            _met.reset(token)
        found = [(name, what) for name in met if (what := self._fault(name, rng_key, params, batch))]
        return "; ".join(f"site {name!r}: {what}" for name, what in found)

    def _fault(self, name: str, rng_key: Array, params: Any, batch: tuple[Any, ...]) -> str:
        token = site.set(name)
        try:
            value, gradient = jax.value_and_grad(self.objective, argnums=1)(rng_key, params, *batch)
        finally:
            site.reset(token)
        if not jnp.isfinite(value):
            return f"its log density is {float(value):g}"
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient)):
            return "the gradient of its log density is not finite"
        return ""


def loss(objective: Callable[..., Array]) -> Loss:
    """An objective to be maximised, `(rng_key, params, ...)`, as the loss that `learning.fit` minimises: minus it.

    Where a loss or a gradient is not finite the error names the sites that it comes from.

    >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, optax
    >>> from latentrace import ppl
    >>> from latentrace.inference import learning, vi
    >>> @ppl.program
    ... def model(params):
    ...     ppl.observe("x", dist.Normal(ppl.sample("z", dist.Normal(0.0, 1.0)), 1.0), 2.0)
    >>> guide = ppl.program(lambda params: ppl.sample("z", dist.Normal(params["loc"], jnp.exp(params["log_scale"]))))
    >>> start = {"loc": jnp.zeros(()), "log_scale": jnp.zeros(())}
    >>> found = learning.fit(vi.loss(vi.elbo(model, guide, num_samples=16)), start, optax.adam(0.05), num_steps=400,
    ...                      rng_key=jax.random.key(0))
    >>> abs(found.params["loc"] - 1.0) < 0.1
    Array(True, dtype=bool)
    """
    return Loss(objective)
