"""Guides made by others: their densities are right if weights under them average to the evidence."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.infer.autoguide import (
    AutoBNAFNormal,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from latentrace import models, ppl
from latentrace.inference import learning, vi
from latentrace.ppl.errors import NonFiniteGradientError, SiteError


@ppl.program
def model(params):
    scale = ppl.sample("scale", dist.Gamma(3.0, 2.0))
    z = ppl.sample("z", dist.Normal(0.4, scale))
    ppl.observe("x", dist.Normal(z, 0.8), 1.3)


def log_evidence() -> float:
    """By integration over the scale; z is Gaussian given it."""
    scale = jnp.linspace(1e-3, 14, 100_001)
    log_p = dist.Gamma(3.0, 2.0).log_prob(scale) + dist.Normal(0.4, jnp.hypot(scale, 0.8)).log_prob(1.3)
    return float(jax.nn.logsumexp(log_p) + jnp.log(scale[1] - scale[0]))


def check_weights(guide, params, model=model, expected=None, samples=20_000):
    """The mean of p / q is the evidence."""
    weight = lambda trace: jnp.exp((vi.log_density(model, trace, params) - trace.log_density).nats)
    keys = jax.random.split(jax.random.key(5), samples)
    weights = np.asarray(jax.jit(jax.vmap(vi.expectation(weight, guide), in_axes=(0, None)))(keys, params))
    expected = np.exp(log_evidence()) if expected is None else expected
    assert abs(weights.mean() - expected) < 4.5 * weights.std() / np.sqrt(len(weights))


QUICK = [AutoNormal, AutoMultivariateNormal, AutoIAFNormal]
SLOW = [AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoBNAFNormal]


@pytest.mark.parametrize("kind", [*QUICK, *[pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW]])
def test_automatic_guides(kind):
    options = {} if kind in (AutoIAFNormal, AutoBNAFNormal) else {"init_scale": 0.5}
    guide = vi.AutoGuide(kind, model, None, rng_key=jax.random.key(1), **options)
    program = ppl.program(guide)
    bound = vi.elbo(model, program, num_samples=32)
    found = learning.fit(
        vi.loss(bound), guide.params, optax.adam(0.02), num_steps=300, rng_key=jax.random.key(2), progress=False
    )
    assert found.losses[-50:].mean() < found.losses[:20].mean() - 0.05
    assert -found.losses[-100:].mean() < log_evidence() + 0.03
    check_weights(program, found.params)


def test_a_part_of_a_guide():
    """The continuous sites of a program with a discrete one."""

    @ppl.program
    def mixed(params):
        k = ppl.sample("k", dist.Bernoulli(0.3))
        z = ppl.sample("z", dist.Normal(jnp.where(k == 1, 2.0, -1.0), 1.0))
        ppl.observe("x", dist.Normal(z, 1.0), 0.5)

    auto = vi.AutoGuide(AutoNormal, mixed, None, rng_key=jax.random.key(0), init_scale=1.2)

    @ppl.program
    def guide(params):
        ppl.sample("k", dist.Bernoulli(jax.nn.sigmoid(params["logit"])))
        auto(params["auto"])

    normal = lambda mean: float(jnp.exp(dist.Normal(mean, 2**0.5).log_prob(0.5)))
    params = {"logit": jnp.float32(-0.3), "auto": auto.params}
    check_weights(guide, params, mixed, 0.3 * normal(2.0) + 0.7 * normal(-1.0))


def test_what_automatic_guides_refuse():
    loop = ppl.program(lambda: jax.lax.scan(lambda c, _: (c, ppl.sample("z", dist.Normal(0.0, 1.0))), 0.0, length=3)[1])
    with pytest.raises(SiteError, match="'z' stands in a loop or plate"):
        vi.AutoGuide(AutoNormal, loop, rng_key=jax.random.key(0))
    guide = vi.AutoGuide(AutoNormal, model, None, rng_key=jax.random.key(0))
    flow = dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.ExpTransform())
    with pytest.raises(SiteError, match=r"'scale/base' is auxiliary: .* have no density at given values"):
        vi.log_density(ppl.program(lambda: vi.flow("scale", flow)), {"scale": 1.0})
    with pytest.raises(SiteError, match="no parameter 'scale_auto_loc'"):
        vi.elbo(model, ppl.program(guide))(jax.random.key(0), {})


def test_implicit_guide_of_an_affine_network_is_exact():
    @ppl.program
    def plane(params):
        z = ppl.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        ppl.observe("x", dist.Normal(z.sum(), 1.0), 1.0)

    weights = jnp.array([[1.1, 0.2, 0.3], [-0.1, 0.9, 0.4]])
    guide = ppl.program(lambda params: vi.implicit("z", lambda e: params["w"] @ e + 0.2, noise_size=3, scale=0.3))
    check_weights(guide, {"w": weights}, plane, float(jnp.exp(dist.Normal(0.0, 3**0.5).log_prob(1.0))))


def test_amortised_guide_of_a_network():
    """An NNX module: its parameters are a pytree like any other."""
    encoder = nnx.Sequential(nnx.Linear(1, 16, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(16, 2, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(encoder)

    @ppl.program
    def observed(params, x):
        z = ppl.sample("z", dist.Normal(0.0, 1.0))
        ppl.observe("x", dist.Normal(z, 1.0), x)

    @ppl.program
    def amortised(params, x):
        mean, log_scale = nnx.merge(graph, params)(x[None])
        ppl.sample("z", dist.Normal(mean, jnp.exp(log_scale)))

    loss = vi.loss(vi.mean_over(vi.elbo(observed, amortised)))
    data = jax.random.normal(jax.random.key(0), (512,)) * 2**0.5
    found = learning.fit(
        loss, params, optax.adam(1e-2), num_steps=400, rng_key=jax.random.key(1), data=data, batch_size=64, progress=False
    )
    gap = lambda x: (
        dist.Normal(0.0, 2**0.5).log_prob(x) - vi.elbo(observed, amortised, num_samples=400)(jax.random.key(2), found.params, x)
    )
    assert max(abs(float(gap(jnp.float32(x)))) for x in (-1.5, 0.0, 1.0)) < 0.05


def test_mean_over_a_batch():
    """The mean of what each item gives with a key of its own, texts included."""
    lm = models.MarkovLM(jnp.array([0.1, 0.5, -0.2]), jnp.array([[0.3, 0.1, 0.9], [0.4, -0.3, 0.2], [0.0, 0.6, 0.1]]), 0)

    @ppl.program
    def guide(params, item):
        return ppl.generate("text", ppl.prompt(lm, item), max_tokens=4)[0]

    cost = lambda trace: trace.log_density.nats + 10.0 * trace.values["text"].length
    objective = vi.expectation(cost, guide, num_samples=3)
    items = jnp.array([[1, 2, -1], [2, 2, 1], [1, -1, -1]])
    keys = jax.random.split(jax.random.key(7), 3)
    alone = [objective(key, None, item) for key, item in zip(keys, items)]
    assert np.std(alone) > 0
    np.testing.assert_allclose(vi.mean_over(objective)(jax.random.key(7), None, items), np.mean(alone), rtol=1e-5)


def test_impossible_traces_make_a_bound_minus_infinity():
    """Not NaN: the value is right where there is no gradient."""
    fair = ppl.program(lambda w: ppl.sample("x", dist.Bernoulli(logits=w)))
    never = ppl.program(lambda w: ppl.condition("never", ppl.sample("x", dist.Bernoulli(0.5)) > 1))
    assert vi.elbo(never, fair)(jax.random.key(0), 0.3) == -jnp.inf
    assert vi.iwae(never, fair, 3)(jax.random.key(0), 0.3) == -jnp.inf


# --- what is not finite ---------------------------------------------------------------------------------------------------


def test_errors_name_the_site_at_fault():
    @ppl.program
    def broken(params):
        z = ppl.sample("z", dist.Normal(0.0, 1.0))
        ppl.sample("y", dist.Normal(0.0, jnp.exp(z)))
        ppl.factor("penalty", -jnp.sqrt(params["w"] - 1.0) - z**2)

    @ppl.program
    def guide(params):
        ppl.sample("z", dist.Normal(params["w"], 1.0))
        ppl.sample("y", dist.Normal(0.0, 1.0))

    loss = vi.loss(vi.elbo(broken, guide))
    step = dict(num_steps=50, rng_key=jax.random.key(0), progress=False)
    with pytest.raises(NonFiniteGradientError, match="site 'penalty': its log density is") as caught:
        learning.fit(loss, {"w": jnp.float32(1.5)}, optax.sgd(0.05), **step)
    error = caught.value
    assert "'z'" not in str(error)
    assert "'y'" not in str(error)
    assert error.step > 0
    assert np.isfinite(error.fit.params["w"])  # the last good state
    assert len(error.fit.losses) == error.step
    assert np.isfinite(error.fit.losses).all()

    @ppl.program
    def kinked(params):
        ppl.sample("z", dist.Normal(0.0, 1.0))
        ppl.factor("root", jnp.sqrt(params["w"] * 0.0))

    only_z = ppl.program(lambda params: ppl.sample("z", dist.Normal(params["w"], 1.0)))
    with pytest.raises(NonFiniteGradientError, match="site 'root': the gradient of its log density is not finite"):
        learning.fit(vi.loss(vi.elbo(kinked, only_z)), {"w": jnp.float32(1.5)}, optax.sgd(0.05), **step)
