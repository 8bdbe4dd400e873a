"""Objectives of several traces, and of estimated densities: the expectation of the estimated gradient, over all random choices,
is the gradient of the objective's definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from latentrace import ppl
from latentrace.inference import vi

from .grids import exact_expectation

W = jnp.zeros(5)
PAIRS = jnp.array(list(itertools.product((0, 1), repeat=2)))
"""every trace (a, b)"""


def coin(p, slope=0.0):
    return dist.Bernoulli(jnp.asarray(p, jnp.float32) + slope)


@ppl.program
def guide(w):
    a = ppl.sample("a", coin(0.25, w[0]))
    ppl.sample("b", coin(jnp.where(a == 1, 0.75, 0.5), w[1] * (1 + a)))


@ppl.program
def model(w):
    a = ppl.sample("a", dist.Bernoulli(0.6 + w[2]))
    b = ppl.sample("b", dist.Bernoulli(jnp.where(a == 1, 0.3, 0.8)))
    ppl.factor("seen", (1.0 + w[3]) * (a - 0.5 * b) + w[0] * b)


def log_q(w, pair):
    return guide.log_density({"a": pair[0], "b": pair[1]}, w)


def log_p(w, pair):
    return model.log_density({"a": pair[0], "b": pair[1]}, w)


def over_tuples(count, fn):
    """sum over tuples of traces of their probability times fn(log p, log q, their probability's log), as a function of w."""
    tuples = jnp.array(list(itertools.product(range(4), repeat=count)))

    def objective(w, still=None):
        q = jax.vmap(lambda pair: log_q(w, pair))(PAIRS)
        p = jax.vmap(lambda pair: log_p(w, pair))(PAIRS)
        drawn = q if still is None else still
        return sum(jnp.exp(drawn[t].sum()) * fn(p[t], q[t]) for t in tuples)

    return objective


def log_mean_exp(x):
    return jax.nn.logsumexp(x) - jnp.log(len(x))


def check(objective, target, monkeypatch, **drawn):
    value, gradient = jax.jit(jax.value_and_grad(target))(W)
    estimate = lambda rng_key: jax.value_and_grad(lambda w: objective(rng_key, w))(W)
    visits = drawn.pop("visits", {"a": (), "b": ()})
    mean, slope = exact_expectation(estimate, visits, monkeypatch, **drawn)
    np.testing.assert_allclose(mean, value, atol=1e-5)
    np.testing.assert_allclose(slope, gradient, atol=1e-5)


@pytest.mark.parametrize("traces", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_importance_weighted_bound(traces, monkeypatch):
    target = over_tuples(traces, lambda p, q: log_mean_exp(p - q))
    check(vi.iwae(model, guide, traces), target, monkeypatch, traces_drawn=traces)


def test_importance_weighted_bound_of_enumerated_and_measured_sites(monkeypatch):
    target = over_tuples(2, lambda p, q: log_mean_exp(p - q))
    enumerated = vi.iwae(model, guide, 2, estimators={"a": vi.Enumerate()})
    check(enumerated, target, monkeypatch, visits={"b": ()}, traces_drawn=2)
    check(vi.iwae(model, guide, 2, estimators={"b": vi.MeasureValued()}), target, monkeypatch, traces_drawn=2)


def test_two_samples_of_two_traces(monkeypatch):
    target = over_tuples(2, lambda p, q: log_mean_exp(p - q))
    check(vi.vimco(model, guide, 2, num_samples=2), target, monkeypatch, traces_drawn=4)


@pytest.mark.parametrize("alpha", [0.5, 2.0, -1.0])
def test_renyi(alpha, monkeypatch):
    target = over_tuples(2, lambda p, q: log_mean_exp((1 - alpha) * (p - q)) / (1 - alpha))
    check(vi.renyi(model, guide, 2, alpha), target, monkeypatch, traces_drawn=2)


def test_chi_squared(monkeypatch):
    target = over_tuples(1, lambda p, q: jnp.exp(2 * (p - q - 0.3)).sum())
    check(vi.chi_squared(model, guide, log_scale=0.3), target, monkeypatch)


def test_wake_phase(monkeypatch):
    """Drawn as the guide is, and pushed by self-normalised weights."""
    still = jax.vmap(lambda pair: log_q(W, pair))(PAIRS)

    def pushed(p, q):
        weights = jax.lax.stop_gradient(jax.nn.softmax(p - q))
        surrogate = (weights * (p + q)).sum()
        return surrogate + jax.lax.stop_gradient(log_mean_exp(p - q) - surrogate)

    target = lambda w: over_tuples(2, pushed)(w, still)
    check(vi.wake_phase(model, guide, 2), target, monkeypatch, traces_drawn=2)


def test_wake_phase_moves_the_model_as_the_bound_does():
    still = jax.vmap(lambda pair: log_q(W, pair))(PAIRS)
    bound = jax.grad(lambda w: over_tuples(2, lambda p, q: log_mean_exp(p - jax.lax.stop_gradient(q)))(w, still))(W)
    keys = jax.random.split(jax.random.key(0), 40_000)
    found = jax.vmap(jax.grad(lambda w, k: vi.wake_phase(model, guide, 2)(k, w)), in_axes=(None, 0))(W, keys)
    error = found.std(axis=0) / np.sqrt(len(keys))
    assert (jnp.abs(found.mean(axis=0) - bound) < 4.5 * error + 1e-6)[2:4].all()


def test_impossible_traces_have_no_weight():
    dead = jnp.array([-jnp.inf, -jnp.inf])
    assert (vi.importance_weights(dead) == 0).all()
    np.testing.assert_allclose(vi.importance_weights(jnp.array([0.0, -jnp.inf])), [1.0, 0.0])
    never = ppl.program(lambda w: (guide(w), ppl.condition("never", jnp.asarray(False)))[0])
    slope = jax.grad(lambda w: vi.wake_phase(never, guide, 2)(jax.random.key(0), w))(W)
    assert (slope == 0).all()


def test_sleep_phase(monkeypatch):
    @ppl.program
    def prior(w):
        a = ppl.sample("a", coin(0.25, w[2]))
        b = ppl.sample("b", coin(jnp.where(a == 1, 0.5, 0.75)))
        ppl.sample("x", coin(jnp.where(a == b, 0.25, 0.5)))

    @ppl.program
    def recognition(w, x):
        a = ppl.sample("a", coin(0.3 + 0.2 * x, w[0] * (1 + x)))
        ppl.sample("b", coin(jnp.where(a == 1, 0.6, 0.2), w[1] * x))

    triples = [dict(zip("abx", map(jnp.asarray, t))) for t in itertools.product((0, 1), repeat=3)]

    def target(w):
        of = lambda t: jnp.exp(prior.log_density(t, W)) * recognition.log_density({"a": t["a"], "b": t["b"]}, w, t["x"])
        return sum(map(of, triples))

    objective = vi.sleep_phase(prior, recognition, lambda trace, w: (w, trace.values["x"]))
    check(objective, target, monkeypatch, visits={"a": (), "b": (), "x": ()})


def test_forward_kl():
    log_weights = jax.vmap(lambda pair: log_p(W, pair))(PAIRS)
    objective = vi.forward_kl(guide)
    loss = lambda w: objective({"a": PAIRS[:, 0], "b": PAIRS[:, 1]}, log_weights, w)
    posterior = jax.nn.softmax(log_weights)
    target = lambda w: -(posterior * jax.vmap(lambda pair: log_q(w, pair))(PAIRS)).sum()
    for found, expected in zip(jax.value_and_grad(loss)(W), jax.value_and_grad(target)(W)):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("traces", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_sided_bounds(traces, monkeypatch):
    """The upper bound has a draw of the posterior among its traces, the lower one has not; exact draws are averaged here."""
    lower = over_tuples(traces, lambda p, q: log_mean_exp(p - q))(W)
    p, q = (jax.vmap(lambda pair: f(W, pair))(PAIRS) for f in (log_p, log_q))
    posterior = jax.nn.softmax(p)
    others = lambda own: over_tuples(traces - 1, lambda p, q: log_mean_exp(jnp.append(p - q, own)))(W) if traces > 1 else own
    upper = sum(posterior[i] * others(p[i] - q[i]) for i in range(4))
    bounds = vi.evidence_bounds(model, guide, traces)
    values = {"a": PAIRS[:, 0], "b": PAIRS[:, 1]}
    both = lambda rng_key: jax.vmap(lambda exact: jnp.stack(bounds(rng_key, exact, W)))(values)
    monkeypatch.setattr(jax.random, "split", lambda key, num=2: [key] * num)  # both from one world
    found = exact_expectation(both, {"a": (), "b": ()}, monkeypatch, traces_drawn=traces)
    np.testing.assert_allclose(posterior @ found, [lower, upper], atol=1e-5)
    assert lower < jax.nn.logsumexp(p) < upper


# --- estimated densities: b is kept, a integrated out --------------------------------------------------------------------


@ppl.program
def only_b(w):
    b = ppl.sample("b", dist.Bernoulli(0.35 + w[2]))
    ppl.factor("seen", (0.7 + w[3]) * b + w[0] * b)


@ppl.program
def which_a(kept, w):
    ppl.sample("a", coin(jnp.where(kept["b"] == 1, 0.5, 0.25), w[4]))


def hierarchical(particles, with_proposal):
    """E over (a_1, b) of the guide and a_2 ... a_K of the proposal of log p(b) - log mean of the weights."""

    def objective(w):
        total = 0.0
        for b in (0, 1):
            log_target = only_b.log_density({"b": jnp.asarray(b)}, w)
            for others in itertools.product((0, 1), repeat=particles):
                pairs = [jnp.array([a, b]) for a in others]
                joint = jnp.stack([log_q(w, pair) for pair in pairs])
                if with_proposal:
                    drawn = jnp.stack([which_a.log_density({"a": pair[0]}, {"b": pair[1]}, w) for pair in pairs])
                else:
                    drawn = jnp.stack([coin(0.25, w[0]).log_prob(pair[0]) for pair in pairs])
                log_probability = joint[0] + drawn[1:].sum()
                total += jnp.exp(log_probability) * (log_target - log_mean_exp(joint - drawn))
        return total

    return objective


@pytest.mark.parametrize("with_proposal", [False, True])
@pytest.mark.parametrize("particles", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_marginal_as_guide(particles, with_proposal, monkeypatch):
    proposal = which_a if with_proposal else None
    objective = vi.elbo(only_b, vi.marginal(guide, "b", proposal=proposal, num_particles=particles))
    target = hierarchical(particles, with_proposal)
    check(objective, target, monkeypatch, inside={"a": ()}, inside_drawn=particles - 1)


def test_marginal_as_model(monkeypatch):
    @ppl.program
    def q(w):
        ppl.sample("b", coin(0.75, w[1]))

    def target(w):
        total = 0.0
        for b in (0, 1):
            log_b = coin(0.75, w[1]).log_prob(b)
            for pair in itertools.product((0, 1), repeat=2):
                drawn = jnp.stack([coin(0.25, w[0]).log_prob(a) for a in pair])
                joint = jnp.stack([log_q(w, jnp.array([a, b])) for a in pair])
                total += jnp.exp(log_b + drawn.sum()) * (log_mean_exp(joint - drawn) - log_b)
        return total

    objective = vi.elbo(vi.marginal(guide, "b", num_particles=2), q)
    check(objective, target, monkeypatch, visits={"b": ()}, inside={"a": ()}, inside_drawn=2)


@ppl.program
def fair(w):
    ppl.sample("b", coin(0.25, w[1]))


@ppl.program
def weighted(w):
    """Of weights over `fair` that are as 1 to 3, so that choices by weight lie on the grid too."""
    b = ppl.sample("b", coin(0.25, w[1]))
    ppl.factor("seen", jnp.log(3.0) * b + w[0] * b)


def sir(w, b, others):
    """The log density, given fresh competitors, of what resampling yields."""
    gamma = weighted.log_density({"b": b}, w)
    log_w = jnp.stack([weighted.log_density({"b": x}, w) - fair.log_density({"b": x}, w) for x in (b, *others)])
    return gamma - log_mean_exp(log_w)


def test_normalize_as_guide(monkeypatch):
    """Two particles, one of which is chosen by its weight."""

    def target(w):
        total = 0.0
        for pair in itertools.product((jnp.int32(0), jnp.int32(1)), repeat=2):
            log_pair = sum(fair.log_density({"b": b}, w) for b in pair)
            log_w = jnp.stack([weighted.log_density({"b": b}, w) - fair.log_density({"b": b}, w) for b in pair])
            chosen = jax.nn.softmax(log_w)
            for k in range(2):
                cost = only_b.log_density({"b": pair[k]}, w) - sir(w, pair[k], [pair[1 - k]])
                total += jnp.exp(log_pair) * chosen[k] * cost
        return total

    objective = vi.elbo(only_b, vi.normalize(weighted, fair, 2))
    check(objective, target, monkeypatch, visits={"b": ()}, traces_drawn=2, inside={"which": ()})


def test_normalize_as_model(monkeypatch):
    def target(w):
        total = 0.0
        for b, other in itertools.product((jnp.int32(0), jnp.int32(1)), repeat=2):
            log_b, log_other = (fair.log_density({"b": x}, w) for x in (b, other))
            total += jnp.exp(log_b + log_other) * (sir(w, b, [other]) - log_b)
        return total

    objective = vi.elbo(vi.normalize(weighted, fair, 2), fair)
    check(objective, target, monkeypatch, visits={"b": ()}, inside={"b": ()})
