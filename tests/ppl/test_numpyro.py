"""NumPyro models are programs as they stand: densities against NumPyro's own."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import cond, scan
from numpyro.handlers import mask, scale, seed, trace
from numpyro.infer.util import log_density

from latentrace import inference, ppl
from latentrace.ppl import errors

KEY = jax.random.key(0)
Y = jnp.array([2.8, -0.8, 0.7, 1.9])
SIGMA = jnp.array([1.5, 1.0, 1.6, 1.1])
HOLES = jnp.array([0.3, jnp.nan, -1.2, jnp.nan])


def schools(y):
    mu = numpyro.sample("mu", dist.Normal(0.3, 2.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(1.5))
    with numpyro.plate("schools", 4):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, SIGMA), obs=y)
    return numpyro.deterministic("spread", theta.max() - theta.min())


def matrix_plates(y):
    with numpyro.plate("rows", 2, dim=-2):
        a = numpyro.sample("a", dist.Normal(0.5, 1.0))
        with numpyro.plate("columns", 4, dim=-1):
            b = numpyro.sample("b", dist.Gamma(2.0, jnp.exp(a)))
            numpyro.factor("shift", 0.3 * b * y)


def masked_observations(y):
    mu = numpyro.sample("mu", dist.Normal(0.3, 2.0))
    with numpyro.plate("n", 4), mask(mask=~jnp.isnan(HOLES)):
        numpyro.sample("x", dist.Normal(mu, 0.7), obs=HOLES)
        numpyro.sample("z", dist.Exponential(1.0 + mu**2))


def scaled(y):
    mu = numpyro.sample("mu", dist.Normal(0.3, 2.0))
    with scale(scale=2.5):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("y", dist.Normal(z, SIGMA).to_event(1), obs=y)
        numpyro.factor("f", jnp.sin(z))


def chain(y):
    def step(x, y):
        x = numpyro.sample("x", dist.Normal(0.8 * x, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        return x, x

    x0 = numpyro.sample("x0", dist.Normal(0.0, 2.0))
    scan(step, x0, y)


def branches(y):
    mu = numpyro.sample("mu", dist.Normal(0.3, 2.0))
    cond(
        mu > 0,
        lambda y: numpyro.sample("y", dist.Normal(mu, 1.0).expand([4]).to_event(1), obs=y),
        lambda y: numpyro.sample("y", dist.Normal(-mu, 3.0).expand([4]).to_event(1), obs=y),
        y,
    )


def masked_and_expanded_factors(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    with mask(mask=False):
        numpyro.factor("f", 3.0 * x)
    with numpyro.plate("n", 4):
        numpyro.factor("once for each", x)
        with mask(mask=y > 0):
            numpyro.factor("some", x * y)


def mixture(y):
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.array([1.0, 2.0])))
    means = numpyro.sample("means", dist.Normal(jnp.array([-1.0, 2.0]), 1.0).to_event(1))
    with numpyro.plate("n", 4):
        k = numpyro.sample("k", dist.Categorical(weights))
        numpyro.sample("y", dist.Normal(means[k], 0.8), obs=y)


MODELS = [schools, matrix_plates, masked_observations, scaled, chain, masked_and_expanded_factors, mixture]


def draws_of(model, key):
    sites = trace(seed(model, key)).get_trace(Y)
    return {k: s["value"] for k, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_density_is_numpyros(model):
    values = draws_of(model, KEY)
    ours = jax.jit(lambda values: ppl.program(model).log_density(values, Y))
    theirs = jax.jit(lambda values: log_density(model, (Y,), {}, values)[0])
    for i in range(3):
        values = draws_of(model, jax.random.key(i))
        np.testing.assert_allclose(ours(values), theirs(values), rtol=1e-5)


@pytest.mark.parametrize("mu", [0.7, -0.4])
def test_density_of_a_conditional_is_that_of_its_branch(mu):
    means, spread = (mu, 1.0) if mu > 0 else (-mu, 3.0)
    expected = dist.Normal(0.3, 2.0).log_prob(mu) + dist.Normal(means, spread).log_prob(Y).sum()
    np.testing.assert_allclose(ppl.program(branches).log_density({"mu": mu}, Y), expected, rtol=1e-5)


def test_gradients_are_numpyros():
    values = draws_of(schools, KEY)
    ours = jax.grad(lambda values: ppl.program(schools).log_density(values, Y))(values)
    theirs = jax.grad(lambda values: log_density(schools, (Y,), {}, values)[0])(values)
    for name in values:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_posterior_of_a_conjugate_model():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(1.0, 2.0))
        with numpyro.plate("n", 4):
            numpyro.sample("y", dist.Normal(mu, 1.5), obs=y)

    precision = 1 / 4 + 4 / 2.25
    mean, n = (1.0 / 4 + Y.sum() / 2.25) / precision, 20_000
    evidence = dist.MultivariateNormal(jnp.ones(4), 4.0 * jnp.ones((4, 4)) + 2.25 * jnp.eye(4)).log_prob(Y)
    posterior = inference.ImportanceSampling(n).run(KEY, model, Y)
    error = 1 / np.sqrt(precision * posterior.ess)
    assert abs(posterior.expectation("mu") - mean) < 5 * error
    assert abs(posterior.log_evidence - evidence) < 5 / np.sqrt(posterior.ess)


def test_values_and_deterministic_sites_are_recorded():
    posterior = inference.ImportanceSampling(30).run(KEY, schools, Y)
    theta = posterior.values["theta"]
    assert theta.shape == (30, 4)
    np.testing.assert_allclose(posterior.values["spread"], theta.max(1) - theta.min(1), rtol=1e-6)
    np.testing.assert_array_equal(posterior.returned, posterior.values["spread"])
    assert "y" not in posterior.values


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: numpyro.param("w"), "param 'w' has no initial value"),
        (lambda: numpyro.prng_key(), "no trace would record"),
        (lambda: numpyro.plate("n", 10, subsample_size=3).__enter__(), r"plate 'n' subsamples 3 of 10"),
    ],
)
def test_what_cannot_be_a_site(model, message):
    with pytest.raises(errors.SiteError, match=message):
        ppl.program(lambda: model() and None).simulate(KEY)
