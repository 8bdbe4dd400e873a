"""The expectation of every estimate of a gradient, over all its random choices, is the gradient of the enumerated objective."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from latentrace import models, ppl
from latentrace.inference import vi

from .grids import enumerated_traces, exact_expectation

PARAMS = jnp.zeros(6)


def coin(p, slope):
    """A coin of probability p, whatever the parameters, which move it by a slope."""
    return dist.Bernoulli(jnp.asarray(p, jnp.float32) + slope)


def dependent():
    """Two coins and a die, each depending on what comes before."""

    @ppl.program
    def guide(w):
        a = ppl.sample("a", coin(0.25, w[0]))
        probs = jnp.where(a == 1, jnp.array([0.5, 0.25, 0.25]), jnp.array([0.25, 0.25, 0.5])) + w[1] * jnp.array(
            [1.0, -3.0, 2.0]
        )
        b = ppl.sample("b", dist.Categorical(probs))
        ppl.sample("c", coin(jnp.where(b == 2, 0.75, 0.5), (w[2] + w[0]) * (1 + a)))

    @ppl.program
    def model(w):
        a = ppl.sample("a", dist.Bernoulli(0.4 + w[3]))
        b = ppl.sample("b", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
        ppl.factor("first", (1 + w[4]) * (a - 2.0 * b))
        c = ppl.sample("c", dist.Bernoulli(jnp.where(a == b, 0.9, 0.3)))
        ppl.factor("last", 0.7 * c * b + w[5] * c)

    return guide, model, {"a": (), "b": (), "c": ()}


def looping():
    """A chain of three coins; the model draws a fourth one first."""

    @ppl.program
    def guide(w):
        def step(x, i):
            x = ppl.sample("x", coin(jnp.where(x == 1, 0.75, 0.25), w[0] * (1.0 + i) + w[1] * x))
            return x, x

        _, xs = jax.lax.scan(step, 1, jnp.arange(3))
        ppl.sample("end", coin(jnp.where(xs.sum() > 1, 0.5, 0.25), w[2]))

    @ppl.program
    def model(w):
        end = ppl.sample("end", dist.Bernoulli(0.3 + w[3]))

        def step(x, i):
            x = ppl.sample("x", dist.Bernoulli(jnp.where(x == 1, 0.6, 0.2)))
            ppl.factor("reward", (0.5 + w[4]) * x * (i + 1.0) - end * x)
            return x, x

        jax.lax.scan(step, 0, jnp.arange(3))

    return guide, model, {"x": (3,), "end": ()}


def branching():
    """A site in a branch, and a while loop that a coin ends."""

    @ppl.program
    def guide(w):
        a = ppl.sample("a", coin(0.25, w[0]))
        extra = lambda: ppl.sample("extra", coin(0.75, w[1]))
        b = jax.lax.cond(a == 1, extra, lambda: 2)

        def body(carry):
            i, _ = carry
            ppl.bound(3)
            return i + 1, ppl.sample("go", coin(jnp.where(b == 1, 0.5, 0.25), w[2] * (i + 1.0)))

        jax.lax.while_loop(lambda c: (c[1] == 1) & (c[0] < 3), body, (0, 1))

    @ppl.program
    def model(w):
        a = ppl.sample("a", dist.Bernoulli(0.6 + w[3]))
        b = jax.lax.cond(a == 1, lambda: ppl.sample("extra", dist.Bernoulli(0.2)), lambda: 0)

        def body(carry):
            i, _ = carry
            ppl.bound(3)
            go = ppl.sample("go", dist.Bernoulli(0.35 + w[4]))
            ppl.factor("cost", -0.4 * i - b * go)
            return i + 1, go

        jax.lax.while_loop(lambda c: (c[1] == 1) & (c[0] < 3), body, (0, 1))

    return guide, model, {"a": (), "extra": (), "go": (3,)}


def plated():
    """Two elements side by side between two coins."""

    @ppl.program
    def guide(w):
        a = ppl.sample("a", coin(0.25, w[0]))
        z = ppl.vmap(lambda i: ppl.sample("z", coin(jnp.where(a == i, 0.75, 0.5), w[1] * (i + 1.0))))(jnp.arange(2))
        ppl.sample("b", coin(jnp.where(z.sum() == 2, 0.25, 0.5), w[2]))

    @ppl.program
    def model(w):
        b = ppl.sample("b", dist.Bernoulli(0.3 + w[3]))
        a = ppl.sample("a", dist.Bernoulli(0.6))
        z = ppl.vmap(lambda i: ppl.sample("z", dist.Bernoulli(0.2 + 0.3 * i)))(jnp.arange(2))
        ppl.factor("all", (1.0 + w[4]) * (z * jnp.array([0.5, -1.0])).sum() + a * b)

    return guide, model, {"a": (), "z": (2,), "b": ()}


def writing():
    """A coin, and two texts of two tokens in a loop, by a Markov chain that the parameters move."""
    initial = jnp.log(jnp.array([0.25, 0.5, 0.25]))
    transition = jnp.log(jnp.array([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))

    def moved(w):
        return models.MarkovLM(initial + w[:3], transition + w[None, 3:], 0)

    @ppl.program
    def guide(lm, w):
        def step(context, _):
            text, context = ppl.generate("text", context, max_tokens=2, until=[2])
            return context, text

        jax.lax.scan(step, ppl.prompt(lm), length=2)

    other = models.MarkovLM(jnp.array([0.3, -0.2, 0.9]), jnp.array([[0.1, 0.5, -0.3], [0.2, 0.0, 0.4], [0.7, -0.5, 0.2]]), 0)

    @ppl.program
    def model(lm, w):
        def step(context, i):
            text, context = ppl.generate("text", context, max_tokens=2, until=[2])
            ppl.factor("reward", (1.0 + w[0]) * (text.tokens == 1).sum() * (i + 1.0))
            return context, text

        jax.lax.scan(step, ppl.prompt(other), jnp.arange(2))

    return guide, model, {"text": (2, 2)}, lambda w: (moved(w), w)


CASES = {"dependent": dependent, "looping": looping, "branching": branching, "plated": plated, "writing": writing}
_known = {}


def case(name):
    if name not in _known:
        guide, model, visits, *arguments = CASES[name]()
        _known[name] = guide, model, visits, arguments[0] if arguments else lambda w: (w,)
    return _known[name]


def enumerated(guide, arguments, cost):
    """The expectation of a function of (values, w), as a function of w, by all traces of the guide."""
    values = enumerated_traces(guide, *arguments(PARAMS))

    def objective(w):
        args = arguments(w)
        log_q = jax.vmap(lambda v: guide.log_density(v, *args))(values)
        return (jnp.exp(log_q) * jax.vmap(lambda v: cost(v, w))(values)).sum()

    return objective


def evidence_cost(name):
    guide, model, _, arguments = case(name)
    return lambda v, w: model.log_density(v, *arguments(w)) - guide.log_density(v, *arguments(w))


SCORE, EACH, SUM = vi.ScoreFunction(), vi.MeasureValued(), vi.Enumerate()
ESTIMATORS = {
    "score": ("dependent", {}, 1),
    "score of two samples": ("dependent", {}, 2),
    "baselines": ("dependent", {"a": vi.ScoreFunction(1.5), "b": vi.ScoreFunction(-0.5)}, 1),
    "enumerated": ("dependent", dict.fromkeys("abc", SUM), 1),
    "measure-valued": ("dependent", dict.fromkeys("abc", EACH), 1),
    "first enumerated": ("dependent", {"a": SUM}, 1),
    "middle enumerated": ("dependent", {"b": SUM}, 1),
    "middle measure-valued": ("dependent", {"b": EACH}, 1),
    "loop": ("looping", {}, 1),
    "loop, step baselines": ("looping", {"x": vi.ScoreFunction(np.array([0.5, -1.0, 2.0]))}, 1),
    "loop enumerated": ("looping", {"x": SUM}, 1),
    "loop measure-valued": ("looping", {"x": EACH}, 1),
    "after the loop enumerated": ("looping", {"end": SUM}, 1),
    "branches": ("branching", {}, 1),
    "branches enumerated": ("branching", {"extra": SUM, "go": SUM}, 1),
    "branches measure-valued": ("branching", {"extra": EACH, "go": EACH}, 1),
    "plate": ("plated", {}, 1),
    "plate enumerated": ("plated", {"z": SUM}, 1),
    "plate measure-valued": ("plated", {"z": EACH}, 1),
    "texts": ("writing", {}, 1),
    "texts, token baselines": ("writing", {"text": vi.ScoreFunction(np.array([[0.5, -1.0], [2.0, 0.1]]))}, 1),
}


SLOW = {
    "baselines",
    "first enumerated",
    "middle enumerated",
    "after the loop enumerated",
    "loop enumerated",
    "branches measure-valued",
    "plate enumerated",
    "plate measure-valued",
}


@pytest.mark.parametrize(
    "label", [pytest.param(label, marks=pytest.mark.slow) if label in SLOW else label for label in ESTIMATORS]
)
def test_gradient_of_the_evidence_bound(label, monkeypatch):
    name, estimators, samples = ESTIMATORS[label]
    guide, model, visits, arguments = case(name)
    target = enumerated(guide, arguments, evidence_cost(name))
    value, gradient = jax.jit(jax.value_and_grad(target))(PARAMS)
    drawn = {site: dims for site, dims in visits.items() if not isinstance(estimators.get(site), vi.Enumerate)}
    objective = vi.elbo(model, guide, estimators=estimators, num_samples=samples)
    estimate = lambda rng_key: jax.value_and_grad(lambda w: objective(rng_key, *arguments(w)))(PARAMS)
    mean, slope = exact_expectation(estimate, drawn, monkeypatch, traces_drawn=samples)
    np.testing.assert_allclose(mean, value, atol=1e-5)
    np.testing.assert_allclose(slope, gradient, atol=1e-5)
