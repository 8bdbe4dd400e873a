"""Estimators of continuous and relaxed sites against exact gradients, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints, transforms

from latentrace import models, ppl
from latentrace.inference import vi
from latentrace.ppl.errors import SiteError, SiteNameError

SAMPLES = 100_000


def estimated(make, cost, estimator, w, samples=SAMPLES):
    """Gradients float32[samples, len(w)] of E[cost(x)], x drawn from make(w)."""
    guide = ppl.program(lambda w: ppl.sample("x", make(w)))
    objective = vi.expectation(lambda trace: cost(trace.values["x"]), guide, estimators={"x": estimator})
    keys = jax.random.split(jax.random.key(0), samples)
    return np.asarray(jax.jit(jax.vmap(jax.grad(objective, argnums=1), in_axes=(0, None)))(keys, jnp.asarray(w)))


def integrated(make, cost, w, points):
    """The gradient of the integral of density times cost over an even grid of points; or of their sum."""
    width = points[1] - points[0]
    return np.asarray(
        jax.grad(lambda w: width * (jnp.exp(make(w).log_prob(points)) * jax.vmap(cost)(points)).sum())(jnp.asarray(w))
    )


REALS, POSITIVE, UNIT, WHOLE = (
    jnp.linspace(-12, 12, 24001),
    jnp.linspace(1e-6, 60, 600_001),
    jnp.linspace(1e-6, 1 - 1e-6, 400_001),
    jnp.arange(60.0),
)
NORMAL = lambda w: dist.Normal(w[0], w[1])
GAMMA = lambda w: dist.Gamma(w[0], w[1])
BETA = lambda w: dist.Beta(w[0], w[1])
EXACT = {
    "normal, reparameterised": (NORMAL, jnp.sin, vi.Reparameterised(), [0.3, 0.8], REALS),
    "normal, score": (NORMAL, jnp.sin, vi.ScoreFunction(0.2), [0.3, 0.8], REALS),
    "normal, measure-valued": (NORMAL, jnp.sin, vi.MeasureValued(), [0.3, 0.8], REALS),
    "gamma, implicit": (GAMMA, jnp.log1p, vi.Reparameterised(), [2.5, 0.7], POSITIVE),
    "gamma, accept-reject": (GAMMA, jnp.log1p, vi.AcceptReject(), [2.5, 0.7], POSITIVE),
    "gamma of small shape, accept-reject": (GAMMA, lambda x: x, vi.AcceptReject(), [0.8, 0.7], POSITIVE),
    "beta, implicit": (BETA, jnp.square, vi.Reparameterised(), [2.0, 3.5], UNIT),
    "beta, accept-reject": (BETA, jnp.square, vi.AcceptReject(), [2.0, 3.5], UNIT),
    "exponential, measure-valued": (lambda w: dist.Exponential(w[0]), jnp.log1p, vi.MeasureValued(), [0.7], POSITIVE),
    "Poisson, measure-valued": (lambda w: dist.Poisson(w[0]), lambda x: jnp.sin(1.0 * x), vi.MeasureValued(), [2.3], WHOLE),
    "Poisson, score": (lambda w: dist.Poisson(w[0]), lambda x: jnp.sin(1.0 * x), vi.ScoreFunction(), [2.3], WHOLE),
}  # fmt: skip


@pytest.mark.parametrize("label", EXACT)
def test_gradient_against_quadrature(label):
    make, cost, estimator, w, points = EXACT[label]
    found = estimated(make, cost, estimator, w)
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (abs(found.mean(axis=0) - integrated(make, cost, w, points)) < 4.5 * error + 2e-4).all()


@pytest.mark.parametrize("estimator", [vi.Reparameterised(), vi.AcceptReject(), vi.ScoreFunction(1.0)])
def test_dirichlet(estimator):
    """E[x_i] = a_i / sum a."""
    a, weights = jnp.array([0.6, 2.0, 1.5]), jnp.array([1.0, -2.0, 0.5])
    found = estimated(dist.Dirichlet, lambda x: x @ weights, estimator, a)
    expected = jax.grad(lambda a: (a / a.sum()) @ weights)(a)
    assert (abs(found.mean(axis=0) - expected) < 4.5 * found.std(axis=0) / np.sqrt(len(found))).all()


def test_vectors_of_measure_valued_elements():
    """Every element of a site has differences of its own."""
    w, slopes = jnp.array([0.2, -0.4, 0.9]), jnp.array([1.0, 2.0, -1.0])
    make = lambda w: dist.Normal(w, 0.5).to_event(1)
    found = estimated(make, lambda x: (slopes * x).sum() ** 2, vi.MeasureValued(), w, 20_000)
    expected = 2 * (slopes @ w) * slopes
    assert (abs(found.mean(axis=0) - expected) < 4.5 * found.std(axis=0) / np.sqrt(len(found))).all()


def test_relaxed_estimators_are_of_the_relaxed_expectation():
    """Gumbel-softmax is unbiased for its own, relaxed target and says that it is biased; a low temperature brings it near."""
    logits, weights = jnp.array([0.5, -0.3, 1.1]), jnp.array([1.0, 3.0, -2.0])
    exact = np.asarray(jax.grad(lambda w: jax.nn.softmax(w) @ weights**2)(logits))
    bias = {}
    for estimator in (vi.GumbelSoftmax(0.5), vi.GumbelSoftmax(0.05), vi.StraightThrough(0.5), vi.ScoreFunction()):
        found = estimated(vi.OneHot, lambda x: (x @ weights) ** 2, estimator, logits, 50_000)
        bias[estimator] = abs(found.mean(axis=0) - exact) / (found.std(axis=0) / np.sqrt(len(found)))
    assert bias[vi.ScoreFunction()].max() < 4.5
    assert bias[vi.GumbelSoftmax(0.5)].max() > 20
    assert bias[vi.StraightThrough(0.5)].max() > 20
    assert bias[vi.GumbelSoftmax(0.05)].max() < bias[vi.GumbelSoftmax(0.5)].max() / 3
    assert vi.GumbelSoftmax().biased
    assert vi.StraightThrough().biased
    assert not vi.ScoreFunction().biased


def test_straight_through_draws_one_hot_vectors():
    guide = ppl.program(lambda w: ppl.sample("x", vi.OneHot(w)))
    inside = lambda trace: (trace.values["x"] == 1).sum() * 1.0
    counts = vi.expectation(inside, guide, estimators={"x": vi.StraightThrough()}, num_samples=50)
    assert counts(jax.random.key(0), jnp.array([0.2, 1.0, -1.0])) == 1.0


def _posterior(w):
    z = ppl.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    ppl.observe("x", dist.Normal(z.sum(), 0.5), 1.0 + w[0])


def _gaussian(w):
    ppl.sample("z", dist.Normal(w[1:3], jnp.exp(w[3])).to_event(1))


def test_doubly_reparameterised_gradients():
    """The same expected gradient as that of the bound, with less noise in the guide's parameters."""
    w = jnp.array([0.1, 0.4, 0.3, -0.4])
    keys = jax.random.split(jax.random.key(1), 20_000)
    found = {}
    for doubly in (False, True):
        objective = vi.iwae(_posterior, _gaussian, 8, doubly=doubly)
        found[doubly] = np.asarray(jax.jit(jax.vmap(jax.grad(objective, argnums=1), in_axes=(0, None)))(keys, w))
    error = np.hypot(*[found[d].std(axis=0) / np.sqrt(len(keys)) for d in found])
    assert (abs(found[True].mean(axis=0) - found[False].mean(axis=0)) < 4.5 * error).all()
    assert (found[True].std(axis=0)[1:] < 0.7 * found[False].std(axis=0)[1:]).all()


def test_costs_to_go_are_less_variable():
    """What is paid before a choice is no cost of it."""

    def step(x, _):
        x = ppl.sample("x", dist.Bernoulli(jax.nn.sigmoid(x - 0.5)))
        return x * 1.0, x

    guide = ppl.program(lambda w: jax.lax.scan(lambda x, i: step(x + w, i), 0.0, length=20)[1])

    def rewarded(w):
        def step(x, i):
            x = ppl.sample("x", dist.Bernoulli(0.5))
            ppl.factor("reward", 1.0 * x)
            return x, x

        jax.lax.scan(step, 0, jnp.arange(20))

    to_go = lambda trace: vi.log_density(rewarded, trace, 0.0) * 1
    whole = lambda trace: vi.log_density(rewarded, trace, 0.0).nats
    keys, spread, mean = jax.random.split(jax.random.key(0), 4000), [], []
    for cost in (to_go, whole):
        found = jax.vmap(jax.grad(vi.expectation(cost, guide), argnums=1), in_axes=(0, None))(keys, 0.3)
        spread.append(found.std())
        mean.append(found.mean())
    assert abs(mean[0] - mean[1]) < 4.5 * np.hypot(*spread) / np.sqrt(len(keys))
    assert spread[0] < 0.7 * spread[1]


# --- what is refused -----------------------------------------------------------------------------------------------------

WRONG = {
    "smooth": (dist.Bernoulli(0.3), vi.Reparameterised(), "BernoulliProbs cannot be reparameterised"),
    "finite": (dist.Poisson(2.0), vi.Enumerate(), "no finite support"),
    "relaxed": (dist.Categorical(jnp.array([0.2, 0.8])), vi.GumbelSoftmax(), "vi.OneHot"),
    "rejection": (dist.Normal(0.0, 1.0), vi.AcceptReject(), "not drawn by rejection"),
    "measure": (dist.Laplace(0.0, 1.0), vi.MeasureValued(), "no measure-valued derivative of Laplace"),
}


@pytest.mark.parametrize("label", WRONG)
def test_estimators_refuse_other_distributions(label):
    distribution, estimator, message = WRONG[label]
    guide = ppl.program(lambda: ppl.sample("x", distribution))
    with pytest.raises(SiteError, match=rf"site 'x'.*{message}"):
        vi.expectation(lambda trace: 1.0, guide, estimators={"x": estimator})(jax.random.key(0))


def _bound(model, guide, **options):
    return vi.elbo(ppl.program(model), ppl.program(guide), **options)(jax.random.key(0))


def one(name, distribution):
    return lambda: ppl.sample(name, distribution)


UNIT_NORMAL = dist.Normal(0.0, 1.0)
MISFITS = {
    "missing": (one("theta", UNIT_NORMAL), one("tehta", UNIT_NORMAL), "draws no value for the model's site 'theta'.*'tehta'"),
    "shape": (one("z", UNIT_NORMAL), one("z", UNIT_NORMAL.expand([2])), r"draws float32\[2\], the model wants float32\[\]"),
    "kind": (one("z", dist.Bernoulli(0.5)), one("z", UNIT_NORMAL), "draws float32.*the model wants int32"),
    "support": (one("z", dist.Exponential(1.0)), one("z", UNIT_NORMAL), "the guide's support is real, the model's positive"),
    "values": (one("z", dist.Bernoulli(0.5)), one("z", dist.Categorical(jnp.ones(3) / 3)), "draws 2, which .* never takes"),
    "observation": (one("z", UNIT_NORMAL), lambda: ppl.observe("z", UNIT_NORMAL, 1.0), "weighs the guide's traces"),
    "loops": (
        one("z", UNIT_NORMAL),
        lambda: jax.lax.scan(lambda c, _: (c, ppl.sample("z", UNIT_NORMAL)), 0.0, length=2),
        "draws it in loops and plates of",
    ),
}


@pytest.mark.parametrize("label", MISFITS)
def test_misfits_of_guide_and_model(label):
    model, guide, message = MISFITS[label]
    with pytest.raises(SiteError, match=message):
        _bound(model, guide)


def test_more_misfits():
    extra = lambda: (ppl.sample("z", UNIT_NORMAL), ppl.sample("more", UNIT_NORMAL))
    with pytest.raises(SiteNameError, match=r"draws site 'more', which the model has not.*vi\.marginal"):
        _bound(one("z", UNIT_NORMAL), extra)
    with pytest.raises(SiteNameError, match=r"estimator of site 'y'.*'z'"):
        _bound(one("z", UNIT_NORMAL), one("z", UNIT_NORMAL), estimators={"y": vi.ScoreFunction()})
    given = ppl.program(one("z", UNIT_NORMAL)).condition({"z": 1.0})
    with pytest.raises(SiteNameError, match="'z', whose value is given in the model"):
        vi.elbo(given, ppl.program(one("z", UNIT_NORMAL)))(jax.random.key(0))
    with pytest.raises(SiteError, match="return one number"):
        vi.expectation(lambda trace: jnp.ones(2), ppl.program(one("z", UNIT_NORMAL)))(jax.random.key(0))
    with pytest.raises(SiteError, match=r"inside the function of a vi\.expectation"):
        vi.log_density(vi.marginal(ppl.program(extra), "z"), {"z": 1.0})


def test_transformed_guides_have_the_right_support():
    positive = dist.TransformedDistribution(UNIT_NORMAL, transforms.ExpTransform())
    assert positive.support is constraints.positive
    assert jnp.isfinite(_bound(one("z", dist.Exponential(1.0)), one("z", positive)))


def test_texts_of_other_lengths_and_constrained_ones_are_refused():
    lm = models.MarkovLM(jnp.zeros(3), jnp.zeros((3, 3)), 0)
    write = lambda count, **options: lambda: ppl.generate("text", ppl.prompt(lm), max_tokens=count, **options)[0]
    with pytest.raises(SiteError, match="the guide draws generate of 2 tokens, the model wants generate of 3 tokens"):
        _bound(write(3), write(2))
    with pytest.raises(SiteError, match="'text' of the guide is not drawn from its model itself"):
        _bound(write(3), write(3, constraint=jnp.array([True, True, False])))
