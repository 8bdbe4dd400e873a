"""The density of what SMC yields: its estimates against how often SMC yields what, on a finite program."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from latentrace import inference, ppl
from latentrace.inference import vi
from latentrace.ppl.errors import SiteError

RUNS = 40_000


@ppl.program
def chain():
    def step(x, reward):
        x = ppl.sample("x", dist.Bernoulli(jnp.where(x == 1, 0.7, 0.4)))
        ppl.factor("reward", reward * x)
        return x, x

    jax.lax.scan(step, 0, jnp.array([1.5, -0.7, 0.9]))


TRACES = jnp.array(list(itertools.product((0, 1), repeat=3)))


@pytest.mark.parametrize("resample", ["multinomial", "systematic"])
def test_estimated_densities_are_unbiased(resample):
    """E[1(x = v) / q_hat(x)] = 1 for every v as a guide; E[q_hat(v)] is the frequency of v as a model."""
    posterior = vi.smc_posterior(chain, inference.SMC(3, ess_threshold=0.9, resample=resample))

    def reciprocals(trace):
        here = (trace.values["x"] == TRACES).all(axis=1)
        return jnp.stack([here * jnp.exp(-trace.log_density.nats), here.astype(jnp.float32)])

    each = lambda i: vi.expectation(lambda trace: reciprocals(trace)[i // 8, i % 8], posterior)
    keys = jax.random.split(jax.random.key(0), RUNS)
    both = jax.jit(jax.vmap(lambda key: jnp.stack([each(i)(key) for i in range(16)])))
    found = np.asarray(both(keys)).reshape(RUNS, 2, 8)
    error = found.std(axis=0) / RUNS**0.5
    assert (abs(found[:, 0].mean(axis=0) - 1) < 4.5 * error[0]).all()
    nothing = ppl.program(lambda: ppl.sample("u", dist.Normal(0.0, 1.0)))  # an expectation over nothing of interest
    at = lambda v: vi.expectation(lambda _: jnp.exp(vi.log_density(posterior, {"x": v}).nats), nothing)
    densities = np.asarray(jax.jit(jax.vmap(lambda key: jnp.stack([at(v)(key) for v in TRACES])))(keys))
    error = np.hypot(error[1], densities.std(axis=0) / RUNS**0.5)
    assert (abs(densities.mean(axis=0) - found[:, 1].mean(axis=0)) < 4.5 * error).all()


def test_bounds_of_smc_tighten_with_particles():
    log_evidence = inference.Exact().run(jax.random.key(0), chain).log_evidence
    bounds = [
        float(vi.elbo(chain, vi.smc_posterior(chain, inference.SMC(n)), num_samples=400)(jax.random.key(1))) for n in (2, 8, 64)
    ]
    assert bounds[0] < bounds[1] < bounds[2] < log_evidence + 0.01
    assert log_evidence - bounds[2] < 0.05


def test_several_traces_and_no_gradient():
    @ppl.program
    def moved(w):
        x = ppl.sample("x", dist.Bernoulli(0.3))
        ppl.factor("reward", w * x)

    bound = vi.iwae(moved, vi.smc_posterior(moved, inference.SMC(4)), 3, num_samples=50)
    value, slope = jax.value_and_grad(bound, argnums=1)(jax.random.key(0), 0.8)
    assert abs(value - jnp.log(0.7 + 0.3 * jnp.exp(0.8))) < 0.1
    assert abs(slope) > 0  # of the model at fixed traces
    guide = vi.smc_posterior(moved, inference.SMC(4))
    with pytest.raises(SiteError, match="no gradient to estimate in its sampler"):
        vi.iwae(moved, guide, 3, estimators={"x": vi.ScoreFunction()})(jax.random.key(0), 0.8)
    with pytest.raises(SiteError, match="no conditional form of resampling 'stratified'"):
        vi.smc_posterior(chain, inference.SMC(4, resample="stratified"))


@pytest.mark.parametrize("num_traces", [None, 3])
def test_what_a_function_returns_beside_its_value_is_averaged(num_traces):
    @ppl.program
    def plain():
        ppl.sample("x", dist.Bernoulli(0.3))

    fn = lambda trace: (2.0 * trace.values["x"].sum(), {"x": trace.values["x"]})
    shape = () if num_traces is None else (num_traces,)
    for guide in (plain, vi.smc_posterior(plain, inference.SMC(2))):
        expectation = vi.expectation(fn, guide, num_traces=num_traces, num_samples=2000, has_aux=True)
        value, aux = expectation(jax.random.key(0))
        assert aux["x"].shape == shape
        assert abs(aux["x"] - 0.3).max() < 4.5 * (0.21 / 2000) ** 0.5
        np.testing.assert_allclose(value, 2.0 * aux["x"].sum(), rtol=1e-5)
