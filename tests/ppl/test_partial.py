"""Partial evaluation changes no value and no gradient, and computes what is known once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentrace.ppl.jaxpr import all_eqns
from latentrace.ppl.partial import specialised

DATA = jnp.array([0.3, -0.8, 1.1])
X = {"a": jnp.float32(0.4), "b": jnp.array([0.2, -0.6, 0.9])}


def straight(x, data):
    known = jnp.sin(data).sum()
    return known * x["a"] + (x["b"] * jnp.cos(data)).sum() + jnp.sin(known)


def one_scan(x, data):
    """A known carry, one that the unknown enters late, one that starts unknown and becomes known, and known outputs."""

    def step(carry, xs):
        known, late, early = carry
        d, b = xs
        known = jnp.sin(known + d)
        return (known, late * b + known, known * 2), (known, late * early, d)

    carry, (ys, zs, ds) = jax.lax.scan(step, (jnp.float32(0.1), jnp.float32(1.0), x["a"]), (data, x["b"]))
    return carry[0] + carry[1] * carry[2] + (ys * zs * ds).sum() * x["a"]


def backwards(x, data):
    def step(carry, d):
        return jnp.cos(carry[0] + d), carry[0] * x["a"]

    def pair(carry, d):
        (one, two), ys = carry, jnp.tanh(d)
        return (jnp.cos(one + ys), two * x["a"] + one), ys * two

    last, zs = jax.lax.scan(pair, (jnp.float32(0.2), x["a"]), data, reverse=True)
    return last[1] + (zs * jax.lax.scan(lambda c, d: step((c,), d), 0.3, data)[1]).sum()


def constant_outputs(x, data):
    def step(carry, d):
        return (jnp.float32(2.0), carry[1] + x["a"] * carry[0]), 1.0

    carry, ones = jax.lax.scan(step, (x["a"], data[0]), data)
    return carry[0] * carry[1] + ones.sum()


def inside_others(x, data):
    def step(carry, d):
        inner, _ = jax.lax.scan(lambda c, e: (c * x["a"] + e, None), carry, jnp.sin(data))
        return jax.lax.cond(d > 0, lambda: inner, lambda: carry * jnp.sin(d)), None

    whole, _ = jax.lax.scan(step, 0.5, data)
    return jax.jit(lambda y: y * jnp.exp(x["a"]))(whole)


FUNCTIONS = [straight, one_scan, backwards, constant_outputs, inside_others]


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_values_and_gradients(fn):
    @jax.jit
    def rest(x, data):
        return jax.value_and_grad(specialised(lambda x: fn(x, data), X))(x)

    for scale in (1.0, -0.7):
        x = jax.tree.map(lambda y, scale=scale: scale * y, X)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), rest(x, DATA), jax.value_and_grad(fn)(x, DATA))


def test_chains_side_by_side():
    """Under `vmap` what is known may differ between elements."""
    many = jnp.stack([DATA, 2 * DATA])
    one = lambda data, a: specialised(lambda x: one_scan(x, data), X)({**X, "a": a})
    found = jax.vmap(one)(many, jnp.array([0.1, 0.7]))
    expected = [one_scan({**X, "a": a}, d) for d, a in zip(many, (0.1, 0.7))]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("fn", [straight, one_scan, backwards])
def test_what_is_known_is_computed_before(fn):
    """No sine or hyperbolic tangent depends on the arguments."""
    rest = jax.make_jaxpr(specialised(lambda x: fn(x, DATA), X))(X)
    left, before = ([e.primitive.name for e in all_eqns(j)] for j in (rest, jax.make_jaxpr(lambda x: fn(x, DATA))(X)))
    assert not {"sin", "tanh"} & set(left)
    assert {"sin", "tanh"} & set(before)
