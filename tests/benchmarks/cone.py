"""The noisy cone of Becker et al. (2024, PLDI), section on programmable variational inference: bounds of its log evidence.

    x, y ~ Normal(0, 10);  z ~ Normal(x^2 + y^2, 0.1 + (x^2 + y^2) / 100) = 5

A mean-field guide; and one on the circle, x ~ Normal(sqrt(z) cos 2 pi u, s1), y ~ Normal(sqrt(z) sin 2 pi u, s2) with
u ~ Uniform(0, 1) integrated out by 1 or 5 particles, in a bound of 1 or 5 traces. Gradient ascent by steps of 1e-3 over batches
of 64, as published.

    python tests/benchmarks/cone.py
"""

import argparse

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import optax

from latentrace import ppl
from latentrace.inference import learning, vi

PUBLISHED = {"elbo": -8.08, "iwae of 5": -7.77, "hierarchical": -9.75, "importance-weighted": -8.18, "doubly": -7.33}
LAW = "log evidence"


@ppl.program
def model(params):
    x, y = ppl.sample("x", dist.Normal(0.0, 10.0)), ppl.sample("y", dist.Normal(0.0, 10.0))
    square = x**2 + y**2
    ppl.observe("z", dist.Normal(square, 0.1 + square / 100), 5.0)


@ppl.program
def mean_field(params):
    ppl.sample("x", dist.Normal(params["x"], jnp.exp(params["log_sx"])))
    ppl.sample("y", dist.Normal(params["y"], jnp.exp(params["log_sy"])))


@ppl.program
def circle(params):
    angle = 2 * jnp.pi * ppl.sample("u", dist.Uniform())
    ppl.sample("x", dist.Normal(jnp.sqrt(5.0) * jnp.cos(angle), jnp.exp(params["log_sx"])))
    ppl.sample("y", dist.Normal(jnp.sqrt(5.0) * jnp.sin(angle), jnp.exp(params["log_sy"])))


def on_circle(particles):
    return vi.marginal(circle, ("x", "y"), num_particles=particles)


def evidence(size: int = 4001) -> float:
    """log p(z), by an even grid over the square in which the posterior lies."""
    axis = jnp.linspace(-4, 4, size)
    square = axis[:, None] ** 2 + axis[None, :] ** 2
    prior = dist.Normal(0.0, 10.0).log_prob(axis)
    log_p = prior[:, None] + prior[None, :] + dist.Normal(square, 0.1 + square / 100).log_prob(5.0)
    return float(jax.nn.logsumexp(log_p) + 2 * jnp.log(axis[1] - axis[0]))


OBJECTIVES = {
    "elbo": (vi.elbo, mean_field, ()),
    "iwae of 5": (vi.iwae, mean_field, (5,)),
    "hierarchical": (vi.elbo, on_circle(1), ()),
    "importance-weighted": (vi.elbo, on_circle(5), ()),
    "doubly": (vi.iwae, on_circle(5), (5,)),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--samples", type=int, default=50_000, help="of the trained bound")
    arguments = parser.parse_args(argv)
    print(f"log evidence by quadrature: {evidence():.3f}\n\n{'objective':22}{'published':>10}{'found':>10}{'+-':>8}")
    start = {"x": 1.0, "y": 2.0, "log_sx": 0.0, "log_sy": 0.0}
    for name, (make, guide, more) in OBJECTIVES.items():
        params = {k: jnp.float32(v) for k, v in start.items() if guide is mean_field or k.startswith("log")}
        batch = make(model, guide, *more, num_samples=64)
        loss = lambda rng_key, params, batch=batch: -batch(rng_key, params)
        fitted = learning.fit(loss, params, optax.sgd(1e-3), num_steps=arguments.steps, rng_key=jax.random.key(1), segment=1000)
        one = make(model, guide, *more)
        keys = jax.random.split(jax.random.key(2), arguments.samples)
        found = jax.jit(jax.vmap(one, in_axes=(0, None)))(keys, fitted.params)
        print(f"{name:22}{PUBLISHED[name]:10.2f}{found.mean():10.3f}{1.96 * found.std() / len(found) ** 0.5:8.3f}", flush=True)


if __name__ == "__main__":
    main()
