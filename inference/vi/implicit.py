"""Values of a guide that are functions of noise: flows, whose density is exact, and implicit samplers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from latentrace.ppl import sites

Array = jax.Array


def flow(name: str, distribution: dist.TransformedDistribution, *, auxiliary: bool = False) -> Array:
    """A value of a transformed distribution, such as a normalising flow with networks in it; inside a guide.

    It is drawn from the base distribution, as an auxiliary site, and moved by the transforms, of which none is ever inverted:
    not all can be, and none cheaply. Their networks' parameters may be traced, which `ppl.sample` cannot take.

    >>> import jax, numpyro.distributions as dist
    >>> from latentrace import ppl
    >>> from latentrace.inference import vi
    >>> stretched = dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(1.0, 2.0))
    >>> guide = ppl.program(lambda: vi.flow("z", stretched))
    >>> error = lambda trace: trace.log_density.nats - dist.Normal(1.0, 2.0).log_prob(trace.values["z"])
    >>> abs(vi.expectation(error, guide)(jax.random.key(0))) < 1e-6
    Array(True, dtype=bool)
    """
    base = distribution.base_dist
    value = sites.sample(f"{name}/base", base, auxiliary=True)
    log_base, way = jnp.sum(base.log_prob(value)), []
    for transform in distribution.transforms:
        moved, known = transform.call_with_intermediates(value)
        way.append([value, known])
        value = moved
    log_density = jnp.sum(distribution.log_prob(value, way)) - log_base
    return sites.sample(name, dist.Delta(value, log_density=log_density, event_dim=jnp.ndim(value)), auxiliary=auxiliary)


def implicit(name: str, network: Callable[[Array], Array], noise_size: int, *, scale: float = 1e-2) -> Array:
    """A vector float32[D] = network(e) + scale * n, with e float32[noise_size] and n standard normal; inside a guide.

    Its density has no closed form. It is taken to be that of network(e) + J (e' - e) + scale * n, J being the Jacobian at e and
    e' a fresh standard normal vector: a Gaussian (Uppal et al. 2023). That is exact where the network is affine. Otherwise an
    ELBO of such a guide is an approximation, no bound.

    >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
    >>> from latentrace import ppl
    >>> from latentrace.inference import vi
    >>> guide = ppl.program(lambda w: vi.implicit("z", lambda e: jnp.tanh(w @ e), noise_size=3))
    >>> vi.expectation(lambda trace: trace.values["z"].sum(), guide)(jax.random.key(0), jnp.ones((2, 3))).shape
    ()
    """
    noise = sites.sample(f"{name}/noise", dist.Normal(jnp.zeros(noise_size), 1.0).to_event(1), auxiliary=True)
    moved, jacobian = network(noise), jax.jacobian(network)(noise)
    (size,) = moved.shape
    jitter = sites.sample(f"{name}/jitter", dist.Normal(jnp.zeros(size), 1.0).to_event(1), auxiliary=True)
    value = moved + scale * jitter
    local = dist.MultivariateNormal(moved - jacobian @ noise, jacobian @ jacobian.T + scale**2 * jnp.eye(size))
    drawn: Any = sum(dist.Normal(0.0, 1.0).log_prob(x).sum() for x in (noise, jitter))
    return sites.sample(name, dist.Delta(value, log_density=local.log_prob(value) - drawn, event_dim=1))
